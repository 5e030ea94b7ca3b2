"""How large a step is: batches and rows that begin small, as functions of the step alone.

A run reads one long row of shuffled sequences. A smaller step reads a shorter piece of it; a
shorter row is a sequence cut into equal parts, each blind to the others. So no token is read twice
or left out, and which ones a step reads follows from the seed and the step.
"""

from dataclasses import dataclass

import numpy as np

from olmo_base.run.recipe import RecipeError, setting


@dataclass(frozen=True)
class WarmupConfig:
    """The keys of a recipe that let batches and rows begin small; 0 steps: they do not."""

    batch_size_warmup_steps: int = setting(0, low=0, help="steps until batches are whole")
    batch_size_warmup_start: int = setting(0, low=0, help="sequences of the first step")
    length_warmup_steps: int = setting(0, low=0, help="steps until rows are whole")
    length_warmup_start: int = setting(0, low=0, help="tokens of the first rows")

    def __post_init__(self) -> None:
        for what in ("batch_size_warmup", "length_warmup"):
            steps, start = getattr(self, f"{what}_steps"), getattr(self, f"{what}_start")
            if bool(steps) != bool(start):
                missing = "start" if steps else "steps"
                raise RecipeError(f"{what}_{missing}", f"give {what}_steps and {what}_start both.")

    def refuse_misfits(self, sequences_per_step: int, max_length: int) -> None:
        """Errors: RecipeError if a start is more than the whole, or rows cannot double up to it."""
        if self.batch_size_warmup_start > sequences_per_step:
            raise RecipeError(
                "batch_size_warmup_start",
                f"{self.batch_size_warmup_start} is more than the {sequences_per_step} sequences "
                "of a whole step.",
            )
        start = self.length_warmup_start
        times = max_length // start if start else 1
        if start and (times * start != max_length or times & (times - 1)):
            raise RecipeError(
                "length_warmup_start",
                f"{start} does not become max_length {max_length} by doubling. Give {max_length} "
                "divided by 2, 4, 8 or so.",
            )

    def length_at(self, step: int, max_length: int) -> int:
        """Tokens of the rows of step 0, 1, …: doubled at equal distances until they are whole."""
        if step >= self.length_warmup_steps:
            return max_length
        num_doublings = (max_length // self.length_warmup_start).bit_length() - 1
        done = step * (num_doublings + 1) // self.length_warmup_steps
        return self.length_warmup_start << done


@dataclass(frozen=True)
class StepSizes:
    """How many sequences each step reads: growing evenly to ``whole``, and that from then on."""

    whole: int
    start: int = 0
    num_warmup: int = 0

    def at(self, step: int) -> int:
        """Sequences of step 0, 1, …"""
        if step >= self.num_warmup:
            return self.whole
        return self.start + (self.whole - self.start) * step // self.num_warmup

    def before(self, step: int) -> int:
        """Sequences of all steps before this one."""
        steps = np.arange(min(step, self.num_warmup), dtype=np.int64)
        grown = (self.whole - self.start) * steps // max(1, self.num_warmup)
        small = int(grown.sum()) + self.start * len(steps)
        return small + self.whole * max(0, step - self.num_warmup)

    def steps_within(self, num_sequences: float) -> int:
        """The most steps that read no more than so many sequences."""
        beyond = num_sequences - self.before(self.num_warmup)
        if beyond >= 0:
            return self.num_warmup + int(beyond // self.whole)
        low, high = 0, self.num_warmup  # before(low) fits, before(high) does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.before(middle) <= num_sequences else (low, middle)
        return low

    def steps_for(self, num_sequences: float) -> int:
        """The fewest steps that read at least so many sequences."""
        steps = self.steps_within(num_sequences)
        return steps if self.before(steps) >= num_sequences else steps + 1
