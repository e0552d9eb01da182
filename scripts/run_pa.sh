#!/bin/sh
# MindIE's run_pa.sh for GLM-4v, answered by glimt:
#   scripts/run_pa.sh --run|--performance|--precision [--trust_remote_code] WEIGHTS IMAGES \
#       [MAX_BATCH] [MAX_IN] [MAX_OUT]
# PYTHON names the interpreter that glimt is installed in.
exec "${PYTHON:-python3}" -m glimt.compat.mindie "$@"
