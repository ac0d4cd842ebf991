"""Models and evaluations as promote finds them, made by hand."""

import json

from shellv_core.storage import InputDirectory, Manifest, OutputDirectory
from shellv_core.storage.directories import InputReference

NUM_QUESTIONS = 200


def make_model(root, name):
    """A merged model, and all that it was made from: data, a base model and an adapter."""
    data = make_output(f"{root}/data", "prepare_data", "images")
    base = make_output(f"{root}/base", "pretrain_projector", "projector", data=data)
    adapter = make_output(f"{root}/adapters/{name}", "finetune", name, data=data, model=base)
    return make_output(f"{root}/models/{name}", "merge_lora", name, adapter=adapter)


def make_output(uri, stage, content, **inputs):
    output = OutputDirectory(uri, f"fingerprint of {stage} of {content}")
    if output.finished() is None:
        output.begin()
        output.put_bytes(content.encode(), "model/weights")
        references = {name: InputDirectory(each).reference() for name, each in inputs.items()}
        origin = {"commit": "c0ffee", "image": f"r/{stage}@sha256:1", "mlflow_run": f"run of {stage}"}
        output.commit(manifest(output, stage, inputs=references, origin=origin))
    return output.uri


def make_evaluation(root, model_uri, num_right, data="data"):
    """An evaluation of 200 questions of which the first `num_right` were answered rightly."""
    output = OutputDirectory(
        f"{model_uri.replace('/models/', '/evaluations/')}-{num_right}-{data}", f"e{num_right}{data}"
    )
    output.begin()
    right = {str(index): (int(index < num_right), 1) for index in range(NUM_QUESTIONS)}
    output.put_bytes(json.dumps({"candidate": {"pope_random_accuracy": right}}).encode(), "outcomes.json")
    inputs = {
        "model": InputDirectory(model_uri).reference(),
        "data": InputReference(uri="file:///d", content_sha256=data),
    }
    metrics = {"pope_random_accuracy": num_right / NUM_QUESTIONS, "blind_pope_random_accuracy": 0.5}
    output.commit(manifest(output, "evaluate", inputs=inputs, metrics=metrics))
    return output.uri


def manifest(output, stage, **values):
    return Manifest(stage=stage, fingerprint=output.fingerprint, library_version="0", config={}, **values)
