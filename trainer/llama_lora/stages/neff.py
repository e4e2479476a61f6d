"""The second half of compile with compile.runsOn: cpu: compile the graphs that compile collected, on a CPU node.

This frees the Trainium nodes during compilation. Not verified on hardware: neuron_parallel_compile documents
`--command collect` and `--command compile` with one compiler version, but not on different machines.
"""

from __future__ import annotations

from genvalues.common.errors import UserError
from llama_lora.stage import Declaration, Stage


def neff(stage: Stage) -> None:
    """Compile all graphs that compile collected. Raises UserError unless compile.runsOn is cpu."""
    if stage.config.backend != "xla" or stage.config.compile.runs_on != "cpu":
        raise UserError(
            "nothing to do: the compile stage compiles its graphs itself", where="neff", fix="Set compile.runsOn: cpu."
        )
    from llama_lora.backends.xla import compiling

    compiling.compile_collected(stage)


STAGE = Declaration(
    name="neff",
    version=1,
    summary="With compile.runsOn: cpu, compile the graphs that compile collected on Trainium, on a CPU node.",
    after=["compile"],
    reads=lambda config: {},
    run=neff,
)
