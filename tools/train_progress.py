"""What a training run shows while it goes on: a bar for each phase and a line for each epoch."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from sbp_compile.training import Epoch


class ProgressReport:
    """A bar that moves with every step and shows the last epoch's state."""

    def __init__(self, console: Console):
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}{task.fields[state]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> ProgressReport:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def step(self, phase: str, done: int, total: int, loss: float) -> None:
        """Move the bar of `phase`."""
        if phase not in self._tasks:
            self._tasks[phase] = self._bar.add_task(phase, loss=loss, state="")
        self._bar.update(self._tasks[phase], completed=done, total=total, loss=loss)

    def epoch(self, record: Epoch) -> None:
        """Print one line."""
        kept = f"  kept {'-'.join(map(str, record.kept))}" if record.kept else ""
        state = f"  KL {record.kl:.1f}{kept}  MACs 1/{record.mac_ratio:.2f}"
        self._bar.update(self._tasks[record.phase], state=state)
        self._bar.console.print(
            f"{record.phase:>9} {record.epoch:3}  loss {record.loss:.4f}{state}"
            f"  test error {record.error:.2f} %  {record.seconds:.1f} s",
            highlight=False,
            soft_wrap=True,
        )


class Silence:
    """The same without a word, for all processes but the first."""

    def step(self, phase: str, done: int, total: int, loss: float) -> None:
        """Do nothing."""

    def epoch(self, record: Epoch) -> None:
        """Do nothing."""
