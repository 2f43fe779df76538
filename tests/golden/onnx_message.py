"""A small ONNX file as the onnx package writes it, to compare the field numbers and types of our own messages with. It computes nothing.

Written with onnx 1.23.2; the output states the version. Run: python tests/golden/onnx_message.py > tests/golden/onnx_message.json
"""

import json

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def main():
    weight = numpy_helper.from_array(np.array([[1.5, -2.0], [0.25, 3.0]], np.float32), "weight")
    index = numpy_helper.from_array(np.array([-1, 300], np.int64), "index")
    node = helper.make_node("Conv", ["images", "weight"], ["features"], name="conv")
    # In this order: keyword arguments would be sorted.
    node.attribute.append(helper.make_attribute("group", 0))
    node.attribute.append(helper.make_attribute("alpha", 0.5))
    node.attribute.append(helper.make_attribute("pads", [0, 1, 200]))
    graph = helper.make_graph(
        [node],
        "resnet18",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 224])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", 512])],
        [weight, index],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, doc_string="text")
    model.producer_name, model.producer_version = "producer", "0.1"
    helper.set_model_props(model, {"arch": "resnet18", "mean": "[0.485]"})
    print(json.dumps({"onnx": onnx.__version__, "bytes": list(model.SerializeToString(deterministic=True))}))


if __name__ == "__main__":
    main()
