"""Names that Ray gives to its environment variables, files, processes and errors, and documents nowhere or in passing.

All were run with Ray 2.60. Nothing here imports Ray.
"""

# -- environment variables: there is no argument for any of them --

# Of Ray Train's controller, read in the driver and handed on by it.
STATE_TRACKING = "RAY_TRAIN_ENABLE_STATE_TRACKING"  # whether an actor lists training runs for the dashboard
PREEMPTION_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"  # whether an actor asks which nodes are being drained
PREEMPTION_POLL_SECONDS = "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"
HEALTH_CHECK_SECONDS = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"  # between two looks at the workers, and at their reports
# Of the raylet that `ray.init` starts.
STARTUP_CONCURRENCY = "RAY_worker_maximum_startup_concurrency"  # processes that may be starting at a time
IDLE_PROCESSES = "RAY_num_workers_soft_limit"  # idle processes that are kept
PRESTART = "RAY_prestart_worker_first_driver"  # whether a driver that registers has processes started for it

# -- files --

# Ray Train's record of the checkpoints that were committed, in the run directory. No API reads it without a running
# trainer, and none takes a damaged checkpoint off it.
SNAPSHOT = "checkpoint_manager_snapshot.json"

# -- processes --

PROCESS = "ray::"  # how the title of each of Ray's Python processes begins
TRAIN_WORKER = "ray::RayTrainWorker"  # and that of a worker of Ray Train
TRAIN_CONTROLLER = "TrainController"  # class of the actor that runs a training
# How the autoscaler's monitor on the head is started. Ray publishes an autoscaler's limits nowhere.
MONITOR_CONFIG, MONITOR_CLUSTER = "--autoscaling-config", "--gcs-address"

# -- nodes --

HEAD_RESOURCE = "node:__internal_head__"  # only the head has it; `ray.nodes()` does not say which one that is

# -- errors, which reach the driver wrapped, as text or as classes that are not exported --

WORKER_LOST = "WorkerHealthCheckFailedError"  # a worker's actor died
WORKER_SILENT = "WorkerHealthCheckTimeoutError"  # a worker did not answer
DATA_STALLED = "ExecutionTimeoutError"  # no task of a dataset made progress
START_TIMED_OUT = "timed out during startup"  # in the text of `ray.init`'s error
NODE_LOST = "its node has died"  # in the text of an actor's death
OUT_OF_MEMORY = "running low on memory"  # in the text of a task that Ray killed

# -- loggers --

PROGRESS_LOGGER = "ray.data._internal.progress"  # of Ray Data; warns that the progress bars are off
