#!/bin/sh
# What a card's owner runs once, in a checkout with glimt and its development tools installed:
#   scripts/check_cuda.sh
# Every operation, kernel and recorded step against the CPU, then the demo model on the card. Ends
# with a status other than 0 where anything is wrong. PYTHON names the interpreter.
set -eu
python="${PYTHON:-python3}"
"$python" -m glimt doctor
"$python" -m pytest -m cuda -q tests/devices
"$python" -m pytest -q tests/kernels/test_triton.py
for mode in plain no-graphs ""; do
    GLIMT_CUDA="$mode" "$python" -m glimt generate --device cuda --image examples/house.png \
        --prompt "这是什么？" --quant none
done
"$python" -m glimt generate --device cuda --prompt "你好" --quant int8 --kv-dtype int8
"$python" -m glimt precision --device cuda --dtype bfloat16 --against float32
