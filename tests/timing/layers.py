"""PyTorch's times for the single layers of `cargo bench -p shared --bench ops`; run one after the other on a quiet machine.

    RAYON_NUM_THREADS=2 cargo bench -p shared --bench ops
    python tests/timing/layers.py --threads 2                  # PyTorch as installed
    MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_TOP_PAD_=67108864 \\
        python tests/timing/layers.py --threads 2              # with an allocator that keeps freed memory

Prints the median and the minimum in milliseconds. `--cpu-time` counts processor time instead, which other programs on the machine
disturb less; use it with one thread. Whole networks: `tests/peers/run.sh`.
"""

import argparse
import time

import torch
import torch.nn as nn

BATCH = 32
LAYERS = [(64, 64, 3, 1, 56), (64, 128, 3, 2, 56), (256, 256, 3, 1, 14), (512, 512, 3, 1, 7), (64, 256, 1, 1, 56)]


def measure(name, clock, run, rounds=7):
    run()
    times = []
    for _ in range(rounds):
        start = clock()
        run()
        times.append((clock() - start) * 1e3)
    print(f"{name}: {sorted(times)[rounds // 2]:.1f} ms (min {min(times):.1f})")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true")
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, {'processor' if args.cpu_time else 'wall'} time, B={BATCH}")

    for inputs, outputs, kernel, stride, side in LAYERS:
        layer = nn.Sequential(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
        ).to(memory_format=torch.channels_last)
        xs = torch.randn(BATCH, inputs, side, side).to(memory_format=torch.channels_last).requires_grad_()

        def step():
            xs.grad = None
            layer.zero_grad()
            layer(xs).mean((2, 3)).sum().backward()

        name = f"conv_bn_relu {kernel}x{kernel}/{stride} {inputs}->{outputs} at {side}"
        measure(f"{name}, forward", clock, lambda: layer(xs))
        measure(f"{name}, forward and backward", clock, step)


if __name__ == "__main__":
    main()
