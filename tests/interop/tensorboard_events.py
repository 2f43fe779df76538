"""TensorBoard's own reader on the event files of a run: every point once, also after restarts, with the values of metrics.jsonl.

Usage: python tests/interop/tensorboard_events.py RUN        (needs the package tensorboard)
"""

import json
import math
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

run = Path(sys.argv[1])
reader = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
reader.Reload()
tags = reader.Tags()["scalars"]
lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
steps = {line["step"]: line for line in lines if "event" not in line}
epochs = {line["step"]: line for line in lines if line.get("event") == "epoch"}
probes = {line["step"]: line for line in lines if line.get("event") == "probe"}

compared = 0
for group, expected in [("train", steps), ("epoch", epochs), ("probe", probes)]:
    for tag in (tag for tag in tags if tag.startswith(group + "/")):
        points = reader.Scalars(tag)
        places = [point.step for point in points]
        assert places == sorted(set(places)), f"{tag}: steps {places} are not in order, or come twice"
        for point in points:
            value = expected[point.step][tag.split("/", 1)[1]]
            assert math.isclose(point.value, value, rel_tol=1e-6, abs_tol=1e-12), f"{tag} at {point.step}"
            compared += 1
for tag, expected in [("epoch/loss", epochs), ("probe/top1", probes)]:
    if expected:
        places = [point.step for point in reader.Scalars(tag)]
        assert places == sorted(expected), f"{tag} has the steps {places}, expected {sorted(expected)}"
last = max(epochs)
assert [point.step for point in reader.Scalars("train/loss")][-1] == last, "the last step is missing"
for tag in ["train/lr", "speed/images_per_second", "speed/data_wait_percent", "embeddings/spread"]:
    assert tag in tags, f"{tag} is missing among {tags}"
print(f"{compared} points of {len(tags)} curves are those of metrics.jsonl, each once")
