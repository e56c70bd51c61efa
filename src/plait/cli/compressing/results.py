"""What a compression has come to, read back from its stages."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.compress.distill import MODEL, OUTCOME, curve_of, outcome_of
from plait.compress.job import Job
from plait.compress.pipeline import CHOICE, FOUND, PROFILE, SCORES
from plait.compress.score import Scores
from plait.compress.stages import FILE
from plait.compress.verify import FILE as VERIFIED
from plait.config import ConfigError, from_dict
from plait.formats import FORMATS
from plait.formats.checkpoint import Checkpoint, CheckpointError
from plait.model.config import ModelConfig
from plait.train.metrics import write_whole

# a JSON object
Data = Mapping[str, Any]
NAME = "result.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """stages: folder by stage, in order. The others are what those stages wrote.

    models: teacher, student and baselines; of each name, config, costs, measured, validation_loss, agreement, scores.
    shorts: candidate -> validation loss after its short distillation. seconds: by stage.
    """

    out: Path
    job: Job
    teacher: str
    stages: Mapping[str, Path]
    seconds: Mapping[str, float]
    profile: Data
    search: Data
    choice: Data
    verified: Data
    shorts: Mapping[str, float]

    @staticmethod
    def read(out: Path) -> "Results":
        """Read a folder in which a compression has ended.

        Raises: ConfigError for one that holds none.
        """
        try:
            told = json.loads((out / NAME).read_text(encoding="utf-8"))
            job = from_dict(Job, json.loads((out / "job.json").read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{out} holds no compression that has ended ({error}); run plait compress first"
            ) from None
        stages = {name: out / "stages" / folder for name, folder in told["stages"].items()}
        seconds = {name: _json(path / FILE)["seconds"] for name, path in stages.items()}
        shorts = {
            name.partition("-")[2]: float(str(outcome_of(path)["validation_loss"]))
            for name, path in stages.items()
            if name.startswith("short-")
        }
        return Results(
            out=out,
            job=job,
            teacher=told["teacher"],
            stages=stages,
            seconds=seconds,
            profile=_json(stages["profile"] / PROFILE),
            search=_json(stages["search"] / FOUND),
            choice=_json(stages["choose"] / CHOICE),
            verified=_json(stages["verify"] / VERIFIED),
            shorts=shorts,
        )

    @property
    def models(self) -> list[Data]:
        """The teacher, the student, the baselines."""
        return list(self.verified["models"])

    def model(self, name: str) -> Data:
        """One of them."""
        return next(one for one in self.models if one["name"] == name)

    @property
    def why(self) -> Data | None:
        """Puzzle's reasons for the plan that was chosen: score, base, limits, layers, widths, way."""
        return self.search["facts"].get("explain", {}).get(self.choice["chosen"])

    @property
    def student(self) -> Path:
        """The student's checkpoint."""
        return self.out / "stages" / _json(self.stages["verify"] / FILE)["inputs"]["student"] / MODEL

    def scores(self) -> Scores:
        """Importance of the teacher's parts."""
        return Scores.load(self.stages["score"] / SCORES)

    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """Training losses by stage, of those that train."""
        return {name: curve_of(path) for name, path in self.stages.items() if (path / OUTCOME).is_file()}

    def publish(self, teacher: Checkpoint) -> Path:
        """Write the student to OUT/model as it is meant to be used: in the teacher's dtype, with its tokenizer."""
        dtype = str(teacher.dtype).removeprefix("torch.")
        kept = dtype if dtype in ("bfloat16", "float32") else "bfloat16"
        return Checkpoint.open(self.student).save(self.out / MODEL, "native", kept, overwrite=True)

    def exports(self) -> dict[str, str]:
        """Format -> "" if it can express the student, else why not."""
        contents = Checkpoint.open(self.student)
        found = {}
        for name, row in FORMATS.items():
            try:
                row.plan(contents)
                found[name] = ""
            except (CheckpointError, ConfigError) as error:
                found[name] = str(error)
        return found


def note(out: Path, teacher: str, ran: list[tuple[str, float, bool]]) -> None:
    """Write which stages belong to the result of this run."""
    stages = {name.rpartition("-")[0]: name for name, *_ in ran}
    write_whole(out / NAME, json.dumps({"teacher": teacher, "stages": stages}, indent=1) + "\n")


def config_of(model: Data) -> ModelConfig:
    """Of a row of `models`."""
    return ModelConfig.from_dict(model["config"])


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
