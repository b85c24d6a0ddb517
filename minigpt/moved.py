"""Import paths that version 0.2 moved: importing an old one is an error that names the new one."""

import sys

MOVED = {  # old module -> new module
    "minigpt.arguments": "minigpt.settings.groups",
    "minigpt.assets.check_seed_tasks": "tests/assets/check_seed_tasks.py",
    "minigpt.assets.demo_tasks": "examples/demo/demo_tasks.py",
    "minigpt.assets.facts": "examples/demo/facts.py",
    "minigpt.assets.vocabulary": "examples/demo/vocabulary.py",
    "minigpt.config": "minigpt.settings.command_line",
    "minigpt.data.dataset": "minigpt.data.encode",
    "minigpt.data.inspect": "minigpt.data.preview",
    "minigpt.data.json_values": "minigpt.data.read.json_values",
    "minigpt.data.records": "minigpt.data.read.records",
    "minigpt.data.streams": "minigpt.data.read.streams",
    "minigpt.inference.api": "minigpt.api_client",
    "minigpt.inference.compare": "minigpt.evaluation.page",
    "minigpt.inference.fast": "minigpt.inference.packed",
    "minigpt.inference.judge": "minigpt.evaluation.judge",
    "minigpt.inference.next_token": "minigpt.inference.sampling",
    "minigpt.inference.predict": "minigpt.evaluation.predict",
    "minigpt.inference.serve": "minigpt.serving",
    "minigpt.model.hub": "minigpt.model.weights",
    "minigpt.selfinstruct.batch_dir": "minigpt.selfinstruct.run_files",
    "minigpt.selfinstruct.embed": "minigpt.selfinstruct.curation.embed",
    "minigpt.selfinstruct.figures": "minigpt.selfinstruct.report.figures",
    "minigpt.selfinstruct.findings": "minigpt.selfinstruct.report.report_data",
    "minigpt.selfinstruct.labels": "minigpt.selfinstruct.curation.labels",
    "minigpt.selfinstruct.lint": "minigpt.selfinstruct.curation.lint",
    "minigpt.selfinstruct.meaning": "minigpt.selfinstruct.curation.semantic",
    "minigpt.selfinstruct.verb_noun": "minigpt.selfinstruct.report.verb_noun",
    "minigpt.training.checkpoint": "minigpt.training.run.checkpoint",
    "minigpt.training.deepspeed_config": "minigpt.training.engines.deepspeed_config",
    "minigpt.training.deepspeed_engine": "minigpt.training.engines.deepspeed_engine",
    "minigpt.training.deepspeed_file": "minigpt.training.engines.deepspeed_file",
    "minigpt.training.engine": "minigpt.training.engines.torch_engine",
    "minigpt.training.machine": "minigpt.training.precision",
    "minigpt.training.metrics": "minigpt.training.run.metrics",
    "minigpt.training.preemption": "minigpt.training.run.preemption",
    "minigpt.training.report_to": "minigpt.training.run.trackers",
    "minigpt.training.state": "minigpt.training.engines.state",
}


class MovedFinder:
    """Asked by Python after all other finders, for modules that do not exist."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name in MOVED:
            raise ModuleNotFoundError(f"{name} has moved to {MOVED[name]}", name=name)


def refuse_old_paths() -> None:
    sys.meta_path.append(MovedFinder)  # type: ignore[arg-type]  # a class with find_spec is enough
