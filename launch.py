"""What a program needs before PyTorch is imported: which process it is, and how its errors are told."""

import contextlib
import os
import sys
import time

# What a launcher such as torchrun sets: which process this is, and where the first one waits for the others.
PROCESS, MEETING_POINT = ("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("MASTER_ADDR", "MASTER_PORT")


class UserError(ValueError):
    """Something that the person who started the run can mend: shown as one message, without a traceback."""


@contextlib.contextmanager
def telling_errors():
    """Context that ends the program with one message and exit code 1 where a UserError is raised in it."""
    print_any_name()
    try:
        yield
    except UserError as error:
        # Every process meets the same error: the others wait, so that the launcher ends them before they
        # repeat it.
        if is_launched() and os.environ["RANK"] != "0":
            time.sleep(3)
        # An error of a data-loading worker comes with the worker's traceback in front of the message.
        message = str(error).strip().rpartition(f"{type(error).__name__}: ")[2]
        sys.exit(f"error: {message}")


def printable(text):
    """Text that every file and console takes: what is no UTF-8, in a file name, becomes escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def print_any_name():
    """Let the names of files that are no UTF-8 be printed, with escapes, rather than end the program."""
    with contextlib.suppress(AttributeError):  # a notebook's output takes them
        sys.stdout.reconfigure(errors="backslashreplace")


def is_launched():
    """Whether a launcher has set all its variables."""
    return all(os.environ.get(name) for name in (*PROCESS, *MEETING_POINT))


def adopt_launcher():
    """Under ``srun`` with several tasks take Slurm's variables; refuse a launcher's that do not fit together.

    MASTER_ADDR and MASTER_PORT alone start nothing and are left alone.

    Raises:
        UserError: which variables are set, which are missing or wrong, and what to do.
    """
    _adopt_slurm()
    found = {name: os.environ[name] for name in (*PROCESS, *MEETING_POINT) if os.environ.get(name)}
    if not any(name in found for name in PROCESS):
        return
    missing = [name for name in (*PROCESS, *MEETING_POINT) if name not in found]
    numbers = [name for name in found if name != "MASTER_ADDR" and not found[name].isdecimal()]
    if missing:
        problem = f"without {', '.join(missing)}"
    elif numbers:
        problem = f"and {', '.join(numbers)} must be a whole number"
    elif max(int(found["RANK"]), int(found["LOCAL_RANK"])) >= int(found["WORLD_SIZE"]):
        problem = "and a rank must be below WORLD_SIZE"
    else:
        return
    listed = ", ".join(f"{name}={value}" for name, value in found.items())
    raise UserError(
        f"the environment has {listed}, {problem}: for one process, unset {' '.join(found)}; for several, "
        "start them with torchrun, which sets all of these"
    )


def _adopt_slurm():
    if os.environ.get("RANK") or os.environ.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return
    for name, slurm in zip(PROCESS, ("PROCID", "STEP_NUM_TASKS", "LOCALID")):
        os.environ[name] = os.environ.get(f"SLURM_{slurm}", "")
    if not os.environ.get("MASTER_ADDR"):
        raise UserError("srun with several tasks needs MASTER_ADDR and MASTER_PORT set, see scripts/slurm.sh")
    os.environ.setdefault("MASTER_PORT", "29500")
