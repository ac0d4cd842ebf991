"""The seven stages, each a function of values: ``run(config) -> StageResult``."""

STAGE_NAMES = ("prepare_data", "pretrain_projector", "finetune", "merge_lora", "evaluate", "promote", "deploy")
