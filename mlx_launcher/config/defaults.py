"""What holds when nothing is set. Times are seconds, sizes are bytes. The documented numbers are a promise to scripts."""

PORT = 8081
HOST = "127.0.0.1"
# A stranger on ::1 would be reached through `localhost`, so the default is both.
LOOPBACK = ("127.0.0.1", "::1")

CLUSTER_PORT = 32323  # mlx.launch's own
STRATEGIES = ("auto", "tensor", "pipeline")
CONNECTIONS = ("auto", "ring", "jaccl")

STOP_TIMEOUT_S = 30.0
HANG_TIMEOUT_S = 120.0
FREEZE_TIMEOUT_S = 30.0
IDLE_TIMEOUT_S = 0.0

MAX_RESTARTS = 3
RESTART_WINDOW_S = 300.0
BACKOFF_S = 0.5
BACKOFF_MAX_S = 30.0

CACHE_SLOTS = 10
CACHE_MIN_TOKENS = 100
MAX_QUEUE = 32
PREFILL_BATCH = 512  # mlx-textgen's own
MAX_BODY_BYTES = 32 * 1024 * 1024

LOG_MAX_BYTES = 10 * 1024 * 1024
