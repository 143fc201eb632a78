"""SLURM and torchrun: requeueing of a job, and a check of the number of processes."""

import os
import subprocess
from collections.abc import Mapping

_INTERACTIVE = ("bash", "interactive")  # job names under which Lightning starts its processes itself


def requeue(environ: Mapping[str, str] = os.environ) -> str:
    """Requeue this process's SLURM job, which keeps its number and its command; return a message for the user.

    SLURM ends the job within seconds of accepting.
    """
    if "SLURM_JOB_ID" not in environ:
        return "not a SLURM job, so it has to be restarted by hand"
    array = environ.get("SLURM_ARRAY_JOB_ID")
    # SLURM_JOB_ID of an array task may be the number of the whole array, which must not be requeued.
    job = f"{array}_{environ['SLURM_ARRAY_TASK_ID']}" if array else environ["SLURM_JOB_ID"]
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    except OSError as error:
        return f"SLURM job {job} could not be put back into the queue ({error}): submit it again"
    if done.returncode:
        return f"SLURM did not put job {job} back into the queue ({done.stderr.strip()}): submit it again"
    return f"SLURM job {job} is back in the queue"


def check_processes(devices: int, num_nodes: int, environ: Mapping[str, str] = os.environ) -> None:
    """Check that srun or torchrun launched as many processes as the training needs.

    Otherwise they would wait for each other forever, or each would train alone into the same folder.

    Raises:
        ValueError: the numbers differ.
    """
    wanted = f"trainer.devices={devices} trainer.num_nodes={num_nodes}"
    if "TORCHELASTIC_RUN_ID" in environ:
        world, here = int(environ["WORLD_SIZE"]), int(environ["LOCAL_WORLD_SIZE"])
        if (here, world) != (devices, devices * num_nodes):
            raise ValueError(
                f"torchrun started {world} processes, {here} on this node, and {wanted} means {devices * num_nodes}: "
                f"set trainer.devices={here} trainer.num_nodes={world // here}, or torchrun --nproc_per_node={devices} "
                f"--nnodes={num_nodes}"
            )
        return
    if "SLURM_NTASKS" not in environ or environ.get("SLURM_JOB_NAME") in _INTERACTIVE:
        return
    request = f"--nodes={num_nodes} --ntasks-per-node={devices}"
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", environ["SLURM_NTASKS"]))
    nodes = int(environ.get("SLURM_STEP_NUM_NODES", environ.get("SLURM_NNODES", "1")))
    if (tasks, nodes) != (devices * num_nodes, num_nodes):
        raise ValueError(
            f"SLURM has {tasks} tasks on {nodes} nodes for this command, and {wanted} (auto: the GPUs that a process "
            f"sees) means {devices} on each of {num_nodes}: set trainer.devices={tasks // nodes} "
            f"trainer.num_nodes={nodes}, or ask SLURM for {request}"
        )
    if tasks > 1 and "SLURM_STEP_ID" not in environ:
        raise ValueError(
            f"SLURM has {tasks} tasks for this job, and only one was started: write srun before python main.py"
        )
    if tasks > 1 and environ.get("SLURM_NTASKS_PER_NODE") != str(devices):
        raise ValueError(
            f"SLURM lacks --ntasks-per-node={devices}, which Lightning reads: ask for {request} instead of --ntasks"
        )
