"""Upload the adapter, the merged model and the report: to S3, to repositories of the Hub, or to both.

The uploaded README.md is the final model card, with the results of evaluate. Every other file is the one that its
stage's manifest lists, verified by its SHA-256 as it is read and again at its destination.
"""

from __future__ import annotations

import logging
from pathlib import Path

from genvalues.common import files
from genvalues.common.errors import UserError
from llama_lora import model_card, uploads
from llama_lora.stage import Declaration, Manifest, Stage
from llama_lora.uploads import File, hub, s3

log = logging.getLogger(__name__)

MADE_BY = {"adapter": "consolidate", "merged": "merge", "report": "evaluate"}


def publish(stage: Stage) -> None:
    """Write the cards, then upload to each destination that is set."""
    settings = stage.config.publish
    if not settings.enabled:
        raise UserError(
            "nothing to publish to",
            where="publish",
            fix="Set publish.s3.uri, publish.hub.adapter or publish.hub.merged.",
        )
    assert stage.fingerprint is not None
    stage.facts = {}
    with stage.output(stage.paths.published) as folder:
        if settings.s3.uri:
            artifacts = [each for each in settings.s3.artifacts if each != "report" or stage.config.evaluation.enabled]
            if not artifacts:
                what = "has only the report, which evaluation.enabled: false does not make"
                raise UserError(what, where="publish.s3.artifacts", fix="Add adapter or merged.")
            found = [file for artifact in artifacts for file in files_of(stage, artifact, folder, f"{artifact}/")]
            manifest = uploads.manifest_of(stage.config.name, stage.fingerprint, found)
            files.write_bytes(folder / "s3.json", manifest)
            s3.upload(settings.s3.uri, stage.config.name, found, manifest, stage.paths.begun_uploads)
            stage.facts["s3"] = settings.s3.uri
        for artifact, repository in {"adapter": settings.hub.adapter, "merged": settings.hub.merged}.items():
            if repository:
                found = files_of(stage, artifact, folder, "")
                manifest = uploads.manifest_of(stage.config.name, stage.fingerprint, found)
                files.write_bytes(folder / f"hub-{artifact}.json", manifest)
                commit = hub.upload(
                    f"publish.hub.{artifact}",
                    repository,
                    stage.config.name,
                    found,
                    manifest,
                    private=settings.hub.private,
                )
                stage.facts[f"hub {artifact}"] = {"repository": repository, "commit": commit}
    stage.paths.begun_uploads.unlink(missing_ok=True)


def files_of(stage: Stage, artifact: str, cards: Path, prefix: str) -> list[File]:
    """The files of adapter, merged or report as their manifest lists them, with the final card instead of the first."""
    made_by = MADE_BY[artifact]
    manifest = stage.upstream(made_by)
    if artifact == "report":
        name = str(stage.paths.report.relative_to(stage.paths.workspace))
        return [file_of(stage, manifest, name, stage.paths.report.name)]
    folder = stage.paths.adapter if artifact == "adapter" else stage.paths.merged
    root = f"{folder.relative_to(stage.paths.workspace)}/"
    listed = [name for name in manifest.outputs if name.startswith(root)]
    found = [file_of(stage, manifest, name, f"{prefix}{name.removeprefix(root)}") for name in listed]
    card = cards / artifact / model_card.CARD
    if not card.exists():
        kind: model_card.Kind = "adapter" if artifact == "adapter" else "merged"
        files.write_text(card, model_card.card(model_card.facts_of(stage, kind, final=True)))
    name = f"{prefix}{model_card.CARD}"
    others = [file for file in found if file.name != name]
    return [*others, File(name, card, card.stat().st_size, files.sha256(card), stage.name)]


def file_of(stage: Stage, manifest: Manifest, output: str, name: str) -> File:
    """An output of a manifest as a file to upload. Raises UserError for a name that no destination takes."""
    listed = manifest.outputs[output]
    if "\\" in output:
        raise UserError(f"lists the file {output!r}", where=str(stage.paths.manifest(manifest.stage)))
    return File(name, stage.paths.workspace / output, listed.bytes, listed.sha256, manifest.stage)


STAGE = Declaration(
    name="publish",
    version=1,
    summary="Upload adapter, merged model and report to S3 or the Hugging Face Hub (publish.*).",
    after=["tokenize", "consolidate", "merge"],
    reads=lambda config: {
        "s3": config.publish.s3.as_keys(),
        "hub": {"adapter": config.publish.hub.adapter, "merged": config.publish.hub.merged},
        "evaluation": config.evaluation.settings_of_result() if config.evaluation.enabled else None,
    },
    run=publish,
)
