"""python relocate.py   after this folder was moved: open_clip finds the text tower's shape by an absolute path only."""

import json
from pathlib import Path


def relocate(folder: Path, place: Path) -> None:
    """Write into the configuration that lies in `folder` that it lies in `place`."""
    file = folder / "open_clip_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["model_cfg"]["text_cfg"]["hf_model_name"] = str(place.absolute() / "text_config")
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    here = Path(__file__).absolute().parent
    relocate(here, here)
