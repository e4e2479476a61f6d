"""No command loads a pickle, whatever file holds it: checkpoints of both backends, base, adapter, dataset, run."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner

from forked import run_forked
from genvalues.common import files
from genvalues.common.errors import UserError
from genvalues.common.rendered_yaml import RenderedLoader
from genvalues.inputs import chart, yaml_text
from llama_lora.backends.xla import torch_files
from llama_lora.cli import main
from llama_lora.config import UniqueKeys
from trainer.conftest import Run, make_model, write_checkpoint_record
from trainer.test_merge import make_adapter
from trainer.untrusted import Mark, evil_files
from trainer.warm import warm_up

ROOT = Path(__file__).parents[2]
XLA_CHECKPOINT = Path(__file__).parent / "fixtures/neuron/llama-tp2-qv.tar.xz"
# Files that nothing here reads, and that a library would if it found them.
OTHERS = (
    *(".metadata", "__0_0.distcp", "pytorch_model.bin", "adapter_model.bin", "optimizer.pt", "training_args.bin"),
    *("model.safetensors.bin", "vocab.pkl", "tokenizer.pkl", "dataset.pkl", "cache.arrow", "data.pt", "conftest.py"),
)


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Mark:
    return Mark(monkeypatch, tmp_path / "mark")


def ends_without_loading(mark: Mark, *command: str, statuses: tuple[int, ...] = (0, 2)) -> None:
    ended = CliRunner().invoke(main, command)
    assert not mark.left, f"{' '.join(command)} loaded a pickle"
    assert ended.exit_code in statuses and "Traceback" not in ended.output, ended.output


def plant(folder: Path, name: str, content: bytes) -> None:
    """Put the content under a name, and into the checkpoint's list of files as if the trainer had written it."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    record = folder / "checkpoint.json"
    if record.is_file() and name != record.name:
        listed = json.loads(record.read_text())
        listed["files"][name] = {"bytes": len(content), "sha256": files.sha256(folder / name)}
        write_checkpoint_record(record, listed)


def names_in(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def each_planted(folder: Path, scratch: Path) -> list[tuple[Path, str]]:
    """A copy of the folder for each of its files, with that file replaced by a pickle; the forms of pickles take turns.

    And for each form one copy with all OTHERS.
    """
    forms = list(evil_files().values())
    cases = [([name], forms[number % len(forms)]) for number, name in enumerate(names_in(folder))]
    cases += [(list(OTHERS), form) for form in forms]
    made = []
    for number, (names, content) in enumerate(cases):
        copy = shutil.copytree(folder, scratch / f"copy-{number}")
        for name in names:
            plant(copy, name, content)
        made.append((copy, names[0]))
    return made


def test_the_planted_pickles_leave_their_mark_when_they_are_loaded(mark: Mark, tmp_path: Path) -> None:
    for form, content in evil_files().items():
        (tmp_path / "file").write_bytes(content)
        if form == "pickle":
            pickle.loads(content)
        else:
            torch.load(tmp_path / "file", weights_only=False)
        assert mark.left
        mark.folder.rmdir()


def test_consolidate_loads_no_pickle_from_a_native_checkpoint(whole_run: Run, tmp_path: Path, mark: Mark) -> None:
    checkpoint = whole_run.workspace / whole_run.manifest("train")["facts"]["checkpoint"]
    for number, (copy, _) in enumerate(each_planted(checkpoint, tmp_path / "planted")):
        ends_without_loading(
            mark, "consolidate", "--checkpoint", str(copy), "--output", str(tmp_path / f"adapter-{number}")
        )


def test_consolidate_loads_no_pickle_from_an_xla_checkpoint(tmp_path: Path, mark: Mark) -> None:
    with tarfile.open(XLA_CHECKPOINT) as archive:
        archive.extractall(tmp_path)
    for number, (copy, _) in enumerate(each_planted(tmp_path / "checkpoint", tmp_path / "planted")):
        ends_without_loading(
            mark, "consolidate", "--checkpoint", str(copy), "--output", str(tmp_path / f"adapter-{number}")
        )


def test_merge_loads_no_pickle_from_a_base_model_or_an_adapter(tmp_path: Path, mark: Mark) -> None:
    base = make_model(tmp_path / "base", max_shard_size="40KB")
    adapter = make_adapter(base, tmp_path / "adapter")
    planted = [(copy, adapter) for copy, _ in each_planted(base, tmp_path / "bases")]
    planted += [(base, copy) for copy, _ in each_planted(adapter, tmp_path / "adapters")]
    for number, (base_copy, adapter_copy) in enumerate(planted):
        output = tmp_path / f"merged-{number}"
        ends_without_loading(
            mark, "merge", "--base", str(base_copy), "--adapter", str(adapter_copy), "--output", str(output)
        )


def test_tokenize_loads_no_pickle_from_a_base_model(new_run: Callable[..., Run], tmp_path: Path, mark: Mark) -> None:
    base = make_model(tmp_path / "base")
    for copy, _ in each_planted(base, tmp_path / "bases"):
        run = new_run(name=f"run-{copy.name}")
        run.config["model"]["path"] = str(copy)
        arguments = ("--config", str(run.write_config()), "--workspace", str(run.workspace))
        ends_without_loading(mark, "tokenize", *arguments)


def test_tokenize_loads_no_pickle_from_a_dataset_folder(
    new_run: Callable[..., Run], tmp_path: Path, mark: Mark
) -> None:
    from datasets import Dataset

    rows = [{"q": f"What is {n}?", "a": f"It is {n}."} for n in range(20)]
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for copy, name in each_planted(tmp_path / "saved", tmp_path / "datasets"):
        run = new_run(name=f"run-{copy.name}", dataset={"source": str(copy)})
        arguments = ("--config", str(run.write_config()), "--workspace", str(run.workspace))
        ends_without_loading(mark, "tokenize", *arguments)
        for source in (copy / name, copy / "rows.parquet", copy / "rows.jsonl.gz"):
            if not source.exists():
                shutil.copyfile(copy / name, source)
            run.config["dataset"]["source"] = str(source)
            ends_without_loading(mark, "preview", "--config", str(run.write_config()))


@pytest.mark.parametrize("split", ["", "../theirs", "own::theirs"])
def test_a_saved_dataset_reads_no_file_outside_its_folder(
    new_run: Callable[..., Run], tmp_path: Path, split: str
) -> None:
    from datasets import Dataset, DatasetDict

    others = Dataset.from_list([{"q": "a secret?", "a": "of another team"}] * 20)
    others.save_to_disk(tmp_path / "theirs")
    own = Dataset.from_list([{"q": f"What is {n}?", "a": f"It is {n}."} for n in range(20)])
    (DatasetDict({"train": own}) if split else own).save_to_disk(tmp_path / "own")
    if split:
        (tmp_path / "own" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", split]}))
    else:
        state = json.loads((tmp_path / "own" / "state.json").read_text())
        [data] = (tmp_path / "theirs").glob("data-*")
        state["_data_files"] = [{"filename": f"../theirs/{data.name}"}]
        (tmp_path / "own" / "state.json").write_text(json.dumps(state))
    said = new_run(dataset={"source": str(tmp_path / "own")})("tokenize", status=2)
    assert "dataset.source" in said and (split or "../theirs") in said


@pytest.mark.parametrize("type_name", ["os", "Path", "Features", "pa", "eval", "ClassLabel", "../x"])
def test_a_feature_of_any_type_in_a_saved_dataset_runs_nothing(
    new_run: Callable[..., Run], tmp_path: Path, mark: Mark, type_name: str
) -> None:
    from datasets import Dataset

    Dataset.from_list([{"q": f"What is {n}?", "a": f"It is {n}."} for n in range(20)]).save_to_disk(tmp_path / "own")
    file = tmp_path / "own" / "dataset_info.json"
    info = json.loads(file.read_text())
    info["features"]["q"] = {"_type": type_name, "dtype": "string", "names": f"__import__('os').mkdir({mark.folder})"}
    file.write_text(json.dumps(info))
    run = new_run(dataset={"source": str(tmp_path / "own")})
    ends_without_loading(mark, "tokenize", "--config", str(run.write_config()), "--workspace", str(run.workspace))


def test_no_stage_loads_a_pickle_from_the_workspace(whole_run: Run, tmp_path: Path, mark: Mark) -> None:
    content = evil_files()["torch"]
    for stage, folders in {
        "evaluate": ["runs/run/merged", "models"],
        "merge": ["runs/run/adapter", "models"],
        "consolidate": ["runs/run/checkpoints", "datasets"],
    }.items():
        for number, folder in enumerate(folders):
            run = whole_run.copy(tmp_path / f"{stage}-{number}")
            run.config["verify"] = "off"  # so that the files are read, and not only compared with their digests
            for name in [*names_in(run.workspace / folder), *OTHERS]:
                file = run.workspace / folder / name
                if file.suffix != ".json" or "manifest" in name:  # those are of the trainer, and of known form
                    file.parent.mkdir(parents=True, exist_ok=True)
                    size = file.stat().st_size if file.exists() else 0
                    file.write_bytes(content.ljust(size, b"\0")[: size or None])  # sizes are compared before a stage
            run.paths.manifest(stage).unlink()
            CliRunner().invoke(main, [stage, "--config", str(run.write_config()), "--workspace", str(run.workspace)])
            assert not mark.left, f"{stage} loaded a pickle from {folder}"


def test_a_run_config_with_yaml_objects_creates_none(new_run: Callable[..., Run], mark: Mark) -> None:
    run = new_run()
    file = run.write_config()
    file.write_text(file.read_text() + f"\nevil: !!python/object/apply:os.mkdir ['{mark.folder}']\n")
    ends_without_loading(mark, "tokenize", "--config", str(file), "--workspace", str(run.workspace), statuses=(2,))


# --- the reader of torch.save's files


def refusal(file: Path) -> str:
    with pytest.raises(UserError) as error:
        torch_files.load(file)
    assert error.value.where == str(file) and error.value.fix and "\n" not in str(error.value)
    return str(error.value)


def rewritten(file: Path, change: Callable[[bytes], bytes]) -> Path:
    """The archive with its pickle changed, and with the right checksum."""
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            archive.writestr(name, change(content) if name.endswith("data.pkl") else content)
    return file


def saved(folder: Path, content: object) -> Path:
    torch.save(content, folder / "file.pt")
    return folder / "file.pt"


def test_the_reader_returns_what_torch_returns(tmp_path: Path) -> None:
    content = {
        "a": torch.arange(12.0).view(3, 4),
        "b": {"bf16": torch.ones(2, 2, dtype=torch.bfloat16), "step": torch.tensor(3.0), "empty": torch.empty(0, 4)},
        "view": torch.arange(8)[2:6],
        "transposed": torch.arange(6.0).view(2, 3).t(),
        "others": [1, 2.5, None, True, "text"],
        "parameter": torch.nn.Parameter(torch.ones(3), requires_grad=False),
    }
    file = saved(tmp_path, content)
    read, theirs = torch_files.load(file), torch.load(file, weights_only=True)
    assert read.keys() == theirs.keys() and read["others"] == theirs["others"]
    for ours, expected in [(read[key], theirs[key]) for key in ("a", "view", "transposed", "parameter")] + [
        (read["b"][key], theirs["b"][key]) for key in theirs["b"]
    ]:
        assert ours.dtype == expected.dtype and torch.equal(ours, expected)
    before = file.read_bytes()
    read["a"] += 1  # of a private copy
    assert file.read_bytes() == before


@pytest.mark.parametrize("name", ["os.mkdir", "builtins.eval", "torch.load", "torch._utils._rebuild_device_tensor"])
def test_the_reader_knows_no_other_names(tmp_path: Path, mark: Mark, name: str) -> None:
    module, _, function = name.rpartition(".")
    code = f"c{module}\n{function}\n(X".encode()
    argument = str(mark.folder).encode()
    code = code[:-1] + b"X" + len(argument).to_bytes(4, "little") + argument + b"tR."
    said = refusal(rewritten(saved(tmp_path, {"a": 1}), lambda content: b"\x80\x02" + code))
    assert "contains objects other than tensors" in said and not mark.left


@pytest.mark.parametrize(
    ("opcodes", "words"),
    [
        (b"r\xff\xff\xff\x7f.", "memo"),  # LONG_BINPUT, for which Python allocates as many pointers
        (b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", ""),  # BINBYTES8 of 9 exabytes
        (b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f.", ""),  # FRAME
        (b"(d.", "operation DICT"),
        (b"Px\n.", "operation PERSID"),
        (b"ios\nmkdir\n.", "operation INST"),
        (b"\x82\x01.", "operation EXT1"),
        (b"]Q.", "file is damaged"),  # BINPERSID of a list
        (b"}(K\x01", "file is damaged"),
        (b"", "file is damaged"),
    ],
)
def test_the_reader_knows_no_other_operations(tmp_path: Path, opcodes: bytes, words: str) -> None:
    assert words in refusal(rewritten(saved(tmp_path, {"a": 1}), lambda content: b"\x80\x02}" + opcodes))


def test_a_pickle_cannot_change_the_reader(tmp_path: Path) -> None:
    """BUILD sets attributes: of the class of references, of a function, of a description."""
    reference = b"ctorch_xla.utils.serialization\nTensorReference\n"
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
    state = b"}X\x03\x00\x00\x00tidX\x01\x00\x00\x00xs"
    for code in (reference + state + b"b.", rebuild + state + b"b.", reference + b")\x81" + state + b"b."):
        assert refusal(rewritten(saved(tmp_path, {"a": 1}), lambda content, code=code: b"\x80\x02" + code))
    assert torch_files.load(saved(tmp_path, {"a": torch.ones(2)}))["a"].sum() == 2


def test_tensors_larger_than_their_record_or_on_the_same_bytes_are_refused(tmp_path: Path) -> None:
    one = torch.ones(1)
    assert "not one after another" in refusal(saved(tmp_path, {"a": one.expand(1 << 40)}))
    shared = torch.arange(8.0)
    assert "same bytes" in refusal(saved(tmp_path, {"a": shared[:6], "b": shared[4:]}))
    small = saved(tmp_path, {"a": torch.ones(300)})
    longer = rewritten(small, lambda content: content.replace(b"M\x2c\x01", b"M\xff\x7f"))  # 300 -> 32767
    assert "record" in refusal(longer)


def test_archives_that_torch_does_not_write_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file.pt"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(100_000_000))
    assert "not a record of torch.save" in refusal(file)
    os.mkfifo(tmp_path / "fifo")
    assert "not a regular file" in refusal(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(saved(tmp_path, {"a": 1}))
    assert refusal(tmp_path / "link")
    nested: list[object] = []
    nested.append(nested)
    assert "nested too deeply" in refusal(saved(tmp_path, nested))
    lists: list[object] = [1]
    for _ in range(7):
        lists = [lists] * 100  # 10^14 elements
    assert torch_files.load(saved(tmp_path, lists))


# --- in the code


# What may load code, by the name of the call: the arguments that make it safe, or None.
CALLS: dict[str, tuple[str, tuple[str, ...]] | None] = {
    "pickle.load": None,
    "pickle.loads": None,
    "marshal.loads": None,
    "shelve.open": None,
    "dill.loads": None,
    "joblib.load": None,
    "torch.load": ("weights_only", ("True",)),
    "yaml.load": ("Loader", ("HelmLoader", "LOADER", "RenderedLoader", "UniqueKeys")),  # see below
    "yaml.load_all": None,
    "yaml.unsafe_load": None,
    "yaml.full_load": None,
    "numpy.load": ("allow_pickle", ("False",)),
    "np.load": ("allow_pickle", ("False",)),
    "eval": None,
    "exec": None,
    "compile": None,
    "__import__": None,
    "os.system": None,
    "os.popen": None,
}
# An import of pickle is allowed only there.
READER = "trainer/llama_lora/backends/xla/torch_files.py"


def unsafe_calls(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            names = {alias.name for alias in node.names}
            if {"pickle", "cPickle", "dill", "marshal", "shelve", "joblib"} & {each.split(".")[0] for each in modules}:
                found.append("import pickle")
            if any(module.startswith("torch.distributed.checkpoint") for module in modules):
                found.append("torch.distributed.checkpoint")
            if "yaml" in modules and {"load", "Loader", "UnsafeLoader", "FullLoader"} & names:
                found.append("yaml.load")
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name.rpartition(".")[2] in ("read_metadata", "FileSystemReader", "loads_with_pickle"):
                found.append(name)
            if name in CALLS:
                needed = CALLS[name]
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if needed is None or given.get(needed[0]) not in needed[1]:
                    found.append(name)
            if any(keyword.arg == "shell" and ast.unparse(keyword.value) != "False" for keyword in node.keywords):
                found.append("shell")
            if name.endswith((".from_pretrained", ".from_config")):
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                spread = [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg is None]
                local = {"LOCAL", "library_versions.LOCAL", "options"} & set(spread)  # options: of load_tokenizer
                if not local and given.get("trust_remote_code") != "False":
                    found.append(name)
    return found


# Of PEFT, which has no trust_remote_code; the folder is one that this trainer has written.
LOADS_AN_ADAPTER = {"NeuronPeftModelForCausalLM.from_pretrained"}


def test_no_code_of_ours_unpickles_evaluates_or_trusts_a_repositorys_code() -> None:
    sources = [path for part in ("trainer", "generator") for path in sorted((ROOT / part).rglob("*.py"))]
    assert len(sources) > 150
    for path in sources:
        name = path.relative_to(ROOT).as_posix()
        found = set(unsafe_calls(path.read_text(encoding="utf-8"))) - LOADS_AN_ADAPTER
        assert found == ({"import pickle"} if name == READER else set()), name


def test_the_yaml_loaders_that_are_named_are_safe() -> None:
    safe = {yaml.SafeLoader, getattr(yaml, "CSafeLoader", yaml.SafeLoader)}
    assert all(
        safe & set(loader.__mro__) for loader in (chart.LOADER, yaml_text.HelmLoader, RenderedLoader, UniqueKeys)
    )


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, mmap=True)",
        "FileSystemReader(path).read_metadata()",
        "from torch.distributed.checkpoint import FileSystemReader",
        "yaml.load(text, Loader=yaml.Loader)",
        "from yaml import load",
        "eval(text)",
        "exec(text)",
        "numpy.load(path, allow_pickle=True)",
        "AutoConfig.from_pretrained(folder)",
        "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)",
        "AutoModelForCausalLM.from_config(config)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_the_check_of_the_code_finds(source: str) -> None:
    assert unsafe_calls(source)


def test_the_workers_exchange_no_pickled_files(whole_run: Run) -> None:
    """What tokenize's processes and torchrun's workers send each other stays in pipes and sockets."""
    files_written = [path for path in whole_run.workspace.rglob("*") if path.is_file()]
    assert len(files_written) > 30
    for path in files_written:
        content = path.read_bytes()
        with pytest.raises(Exception):  # noqa: B017 - whatever pickle raises for other content
            pickle.Unpickler.load(NoNames(path.open("rb")))
        assert not content.startswith(b"PK") or not zipfile.is_zipfile(path), path


class NoNames(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        raise pickle.UnpicklingError(name)


def test_python_of_a_base_folder_is_not_imported(tmp_path: Path, mark: Mark) -> None:
    """auto_map names code of the repository; a stage neither runs it nor asks whether it may."""
    base = make_model(tmp_path / "base")
    code = f"import os\nos.mkdir({str(mark.folder)!r})\n"
    for name in ("configuration_evil.py", "modeling_evil.py", "tokenization_evil.py", "custom_generate/generate.py"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(code)
    for name, mapping in {
        "config.json": {"AutoConfig": "configuration_evil.E", "AutoModelForCausalLM": "modeling_evil.E"},
        "tokenizer_config.json": {"AutoTokenizer": ["tokenization_evil.E", "tokenization_evil.E"]},
    }.items():
        content = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps({**content, "auto_map": mapping}))
    script = (
        "import sys; from pathlib import Path\n"
        "sys.path.insert(0, '')\n"  # as in a process that is not a fork
        "from llama_lora import evaluation, library_versions\n"
        "from llama_lora.config import Model\n"
        "from llama_lora.data import resolve, snapshot\n"
        "from genvalues.common.errors import UserError\n"
        "base, models = Path(sys.argv[1]), Path(sys.argv[2])\n"
        "folder = snapshot.take_snapshot(Model(path=str(base)), resolve.Source('m', '1'), models)\n"
        "evaluation.load_model(folder); library_versions.load_tokenizer(folder); library_versions.load_config(folder)\n"
        "config = base / 'config.json'\n"
        "config.write_text(config.read_text().replace('\"llama\"', '\"evil\"'))\n"
        "try: snapshot.take_snapshot(Model(path=str(base)), resolve.Source('n', '1'), models)\n"
        "except UserError as error: print(error)\n"
    )
    warm_up()
    ended = run_forked([sys.executable, "-c", script, str(base), str(tmp_path / "models")], cwd=base)
    assert ended.returncode == 0, ended.stderr
    assert "auto_map" in ended.stdout and not mark.left
    assert not list((tmp_path / "models").rglob("*.py"))
