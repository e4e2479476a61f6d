"""With compile.runsOn: cpu, the second half of compile: graphs collected on Trainium become NEFFs on a CPU node.

It frees the Trainium nodes while the compiler works. Not verified by us on hardware: neuron_parallel_compile documents
`--command collect` and `--command compile`, with the same compiler version for both, but not on different machines.
"""

from __future__ import annotations

from genvalues.common.errors import UserError
from llama_lora.stage import Declaration, Stage


def neff(stage: Stage) -> None:
    """Compile everything that compile has collected."""
    if stage.config.backend != "neuron" or stage.config.compile.runs_on != "cpu":
        raise UserError(
            "has nothing to do: compile has compiled its graphs itself", where="neff", fix="Set compile.runsOn: cpu."
        )
    from llama_lora.backends.neuron import compiling

    compiling.compile_collected(stage)


STAGE = Declaration(
    name="neff",
    version=1,
    summary="With compile.runsOn cpu: compile, on a CPU node, the graphs that compile has collected on Trainium.",
    after=["compile"],
    reads=lambda config: {},
    run=neff,
)
