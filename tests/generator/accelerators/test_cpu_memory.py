"""What the stages that compute with the model on a CPU node request."""

from __future__ import annotations

from pathlib import Path

from genvalues.accelerators.architectures import LINEAR, Architecture, from_config, known, table
from genvalues.accelerators.cpu_memory import GIB, HIDDEN_STATES, PROCESS, Memory, resident, stage_memory, streamed


def model(name: str) -> Architecture:
    found = known(name)
    assert found
    return found


LLAMA_8B, LLAMA_70B = model("meta-llama/Llama-3.1-8B"), model("meta-llama/Llama-3.1-70B")
MODULES = list(LINEAR)


def test_every_known_model_is_verified_in_less_than_its_weights_or_4_gib_and_70b_in_24() -> None:
    for row in table().values():
        architecture = from_config(row["config"])
        weights = 2 * architecture.parameters / GIB
        for stage in ("consolidate", "merge"):
            assert stage_memory(architecture, 16, MODULES)[stage].limit <= max(6, weights)
    assert all(memory.limit <= 24 for memory in stage_memory(LLAMA_70B, 64, MODULES, 8192).values())


def test_memory_grows_with_the_width_of_a_layer_and_not_with_their_number() -> None:
    few = from_config({**table()["llama-3.1-70b"]["config"], "num_hidden_layers": 8})
    assert streamed(few) == streamed(LLAMA_70B) > streamed(LLAMA_8B) > 2 * 4096 * 128256


def test_answers_need_the_whole_model_and_are_left_out_where_it_is_too_large() -> None:
    answers, none = (stage_memory(LLAMA_8B, 16, MODULES, samples=samples)["evaluate"] for samples in (True, False))
    assert answers.request * GIB > resident(LLAMA_8B) > 2 * LLAMA_8B.parameters and none.request < 6
    assert (
        stage_memory(LLAMA_70B, 16, MODULES)["evaluate"]
        == stage_memory(LLAMA_70B, 16, MODULES, samples=False)["evaluate"]
    )


def test_rank_length_and_probe_count() -> None:
    def of(r: int = 16, length: int = 2048, verifies: bool = True) -> int:
        return stage_memory(LLAMA_8B, r, MODULES, length, verifies=verifies)["merge"].request

    assert of(r=512) > of() and of(length=32768) > of() > of(verifies=False) >= 2


def test_a_model_that_is_not_known_gets_what_the_largest_known_one_needs() -> None:
    unknown, largest = stage_memory(None, 16, MODULES), stage_memory(LLAMA_70B, 16, MODULES)
    assert unknown["merge"] == largest["merge"] and unknown["evaluate"].request >= 40
    assert stage_memory(None, 16, MODULES, samples=False) == largest


def test_quantities_are_whole_gibibytes_and_the_limit_is_not_lower() -> None:
    assert Memory.of(3.5 * GIB) == (5, 8) and Memory(5, 8).quantities() == {"requests": "5Gi", "limits": "8Gi"}


def test_the_page_has_these_numbers() -> None:
    page = (Path(__file__).parents[3] / "docs/pods.md").read_text(encoding="utf-8")
    small, large = (stage_memory(each, 16, MODULES) for each in (LLAMA_8B, LLAMA_70B))
    assert f"| request, with 15 % more | | {small['merge'].request}Gi | {large['merge'].request}Gi |" in page
    assert f"| bf16 | {small['evaluate'].request}Gi | |" in page
    layers = ((streamed(each) - PROCESS - HIDDEN_STATES) / GIB for each in (LLAMA_8B, LLAMA_70B))
    assert "| bf16 | {:.2f} | {:.2f} |".format(*layers) in page
    adapters = (4 * each.lora_parameters(16, MODULES) / GIB for each in (LLAMA_8B, LLAMA_70B))
    assert "| fp32 | {:.2f} | {:.2f} |".format(*adapters) in page
