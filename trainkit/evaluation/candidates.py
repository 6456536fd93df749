"""What the rows of a sweep sample: the schedulers of a model, or a few-step student beside those of its teacher."""

from pathlib import Path
from typing import NamedTuple

from trainkit.diffusion.few_step import is_few_step
from trainkit.errors import UserError, renamed_flags
from trainkit.sampling.catalogue import CATALOGUE, DEFAULT_STEPS, recommended_scheduler
from trainkit.sampling.load import find_pipeline
from trainkit.sampling.schedulers import available_schedulers, check_steps, load_scheduler
from trainkit.sampling.students import RECORD, read_distillation, student_folders
from trainkit.sampling.table import STUDENT, TEACHER
from trainkit.sampling.weights import weights_digest

FLAG, TEACHER_FLAG = "--sweep", "--teacher_model_name_or_path"
FEW = 8  # the most steps of a student that is compared by default
SOLVERS = ("dpmsolver", "unipc")  # of the teacher, at the steps of its students
DEFAULT_ROWS = {
    "sde_dpmsolver": (10, 20, 50), "dpmsolver": (5, 10, 20), "unipc": (5, 10), "ddim": (50,), "flow_euler": (50,),
    "ddpm": (1000,),
}  # fmt: skip


class Cell(NamedTuple):
    """One row of the table. `scheduler` is a name of sample.py, `student`, or `teacher/` and a name."""

    scheduler: str
    steps: int


class Candidates:
    """The rows that the model in `folder` can have. Raises `UserError` for a teacher that is not the student's.

    `teacher` is the folder or Hub id of a student's teacher; default: the one that distillation.json names.
    """

    def __init__(self, folder: Path, teacher: str | None = None):
        self.folder = folder
        self.students = student_folders(folder) if is_few_step(load_scheduler(folder)) else {}
        self.record = (read_distillation(folder) if self.students else None) or {}
        if teacher is not None and not self.students:
            raise UserError(f"{TEACHER_FLAG} {teacher}: {folder} is not a few-step student; remove the flag")
        self._teacher_name = teacher or self.record.get("teacher")
        self._teacher: Path | None = None

    def parse(self, words: list[str]) -> list[Cell]:
        """The rows of `ddim:10,20 dpmsolver:5`, each once, in their order; without words, a useful choice.

        Raises:
            UserError: a word is not of this form, or the model cannot be sampled so.
        """
        cells: dict[Cell, None] = {}
        for word in words or self._default_words():
            name, _, listed = word.partition(":")
            counts = listed.split(",")
            if not all(count.isdecimal() and int(count) > 0 for count in counts):
                raise UserError(f"{FLAG} {word}: write a scheduler and its steps, such as ddim:10,20,50")
            self._check_name(word, name)
            for count in counts:
                self.open(Cell(name, int(count)))
                cells[Cell(name, int(count))] = None
        return list(cells)

    def open(self, cell: Cell) -> tuple[Path, str | None]:
        """The folder of the pipeline that a row samples, and the name of its scheduler there (None: its own)."""
        if cell.scheduler == STUDENT:
            if cell.steps not in self.students:
                there = ", ".join(map(str, self.students))
                raise UserError(f"{FLAG} {STUDENT}:{cell.steps}: {self.folder} has students of {there} steps")
            return self.students[cell.steps], None
        of_teacher = cell.scheduler.startswith(TEACHER)
        folder, name = (self.teacher, cell.scheduler.removeprefix(TEACHER)) if of_teacher else (self.folder, *cell[:1])
        check_steps(load_scheduler(folder, name), cell.steps, f"{FLAG} {cell.scheduler}")
        return folder, name

    def guidance_scale(self, cell: Cell) -> float | None:
        """The guidance scale of a row whose student has learned one: 1 for the student, that one for the teacher."""
        learned = self.record.get("guidance_scale", 1)
        if not self.students or learned == 1:
            return None
        return learned if cell.scheduler.startswith(TEACHER) else 1.0

    @property
    def teacher(self) -> Path:
        """The folder of the student's teacher."""
        if self._teacher is None:
            self._teacher = self._find_teacher()
        return self._teacher

    def _find_teacher(self) -> Path:
        if self._teacher_name is None:
            raise UserError(f"{TEACHER_FLAG} is missing: {self.folder} has no {RECORD} that names the teacher")
        with renamed_flags(model_name_or_path=TEACHER_FLAG[2:]):
            folder = find_pipeline(self._teacher_name)
        if self.record.get("teacher_sha256", weights_digest(folder)) != weights_digest(folder):
            raise UserError(f"{TEACHER_FLAG} {self._teacher_name}: its weights are not those of {RECORD}")
        return folder

    def _check_name(self, word: str, name: str) -> None:
        if not self.students:
            names = available_schedulers(self.folder)
        elif name.startswith(TEACHER):
            names = [TEACHER + known for known in available_schedulers(self.teacher)]
        else:
            names = [STUDENT]
        if name not in names:
            more = f", or a scheduler of the teacher, such as {TEACHER}ddim" if names == [STUDENT] else ""
            raise UserError(f"{FLAG} {word}: {name} must be one of {', '.join(names)}{more}")

    def _default_words(self) -> list[str]:
        """Rows from few to many UNet calls, so that the first results come early."""
        if not self.students:
            return _rows(self.folder, DEFAULT_ROWS)
        few = tuple(steps for steps in self.students if steps <= FEW) or tuple(self.students)[:1]
        rows = {name: few for name in SOLVERS} | {recommended_scheduler(DEFAULT_STEPS): (DEFAULT_STEPS,)}
        rows |= {name: DEFAULT_ROWS[name] for name in ("ddim", "flow_euler", "ddpm")}
        return [f"{STUDENT}:{','.join(map(str, few))}", *(TEACHER + word for word in _rows(self.teacher, rows))]


def _rows(folder: Path, wanted: dict[str, tuple[int, ...]]) -> list[str]:
    """The words of `wanted` for the schedulers that the model in `folder` has, at steps that they accept."""
    words = []
    for name in available_schedulers(folder):
        counts = [steps for steps in wanted.get(name, ()) if _accepts(folder, name, steps)]
        words += [f"{name}:{steps}" for steps in counts]
    return sorted(words, key=lambda word: int(word.partition(":")[2]))


def _accepts(folder: Path, name: str, steps: int) -> bool:
    try:
        check_steps(load_scheduler(folder, name), steps)
    except UserError:
        return False
    return True


def facts_of(cell: Cell, stock: bool) -> dict:
    """What the catalogue says of a row's scheduler, None for what it does not know or what does not apply.

    `stock`: whether DDPMPipeline can hold the model at all (`is_stock_pipeline`).
    """
    facts = CATALOGUE.get(cell.scheduler.removeprefix(TEACHER))
    known = {} if facts is None else facts._asdict()
    if cell.scheduler == STUDENT:
        known = {"in_stock_pipeline": True}
    if not stock:
        known["in_stock_pipeline"] = None
    return {name: known.get(name) for name in ("order", "stochastic", "in_stock_pipeline")}
