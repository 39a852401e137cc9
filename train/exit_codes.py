"""How the command ends, for shells, launchers and schedulers."""

FAULT = 1  # not the user's doing: a lost rank, a network, a full disk; starting again may help
USER_ERROR = 2  # what was given cannot work; starting again does not help
INTERRUPTED = 130  # 128 + SIGINT: what shells expect of Ctrl-C
STOPPED = 143  # 128 + SIGTERM: schedulers read it as "stopped on request", not as success or failure
