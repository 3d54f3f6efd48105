"""Names of files and folders in runs, checkpoints and saved models: each is defined here, and nowhere else."""

CONFIG_FILE = "config.json"
TRAINER_STATE_FILE = "trainer_state.json"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"

SEAL = "compressm.complete"
"""Lists every file of a checkpoint with its length and checksum; written last."""
HISTORY_FILE = "compressm_history.json"
"""Every attempt at a cut, and what a run needs to continue."""
BASE_FOLDER = "base_model"
"""Folder beside the adapters of a PEFT model: the base that they were trained on, if a cut has changed it."""
KEPT_PREFIX = "_before-cut-"
"""Prefix of a checkpoint kept for a rollback: a Trainer neither rotates it nor pushes what begins with `_`."""
UNFINISHED_FILE = "checkpoint-is-incomplete.txt"
"""Left by transformers' just-in-time checkpoint if it was interrupted."""

CARD_FILE = "README.md"
FIGURES_FOLDER = "compressm_figures"
"""Pictures that the model card shows."""
REPORT_FILE = "report.html"
OLD_REPORT = ("report.md", "report_figures")
"""Written beside the report by earlier versions."""
