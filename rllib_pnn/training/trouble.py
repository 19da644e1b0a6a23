"""What ends a run for good. Apart from the Learners that find it and the algorithms that raise it; no Ray, no torch."""


class TrainingTrouble(RuntimeError):
    """Going on makes no sense, nor does trying again from a checkpoint: a loss, gradient or weight is not finite, say.

    One line that says where (task, column, step) and the mend. `rllib train` ends the run, names the last good
    checkpoint and returns exit code 1.
    """
