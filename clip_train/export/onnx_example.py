"""python example.py PICTURE CAPTION CAPTION …   needs numpy, pillow, onnxruntime and tokenizers; nothing else."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer

here = Path(__file__).parent
view = json.loads((here / "preprocess.json").read_text(encoding="utf-8"))
config = json.loads((here / "tokenizer_config.json").read_text(encoding="utf-8"))

picture = Image.open(sys.argv[1]).convert("RGB")
size, short = view["size"], min(picture.size)
wide, high = (short, short) if view["resize"] == "squash" else picture.size
how = getattr(Image.Resampling, view["interpolation"].upper())
picture = picture.resize((int(size * wide / short), int(size * high / short)), how)
left, top = round((picture.width - size) / 2), round((picture.height - size) / 2)
pixels = np.asarray(picture.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
pixels = ((pixels - np.float32(view["mean"])) / np.float32(view["std"])).transpose(2, 0, 1)[None]

tokenizer = Tokenizer.from_file(str(here / "tokenizer.json"))
tokenizer.enable_truncation(config["model_max_length"])
tokenizer.enable_padding(pad_id=tokenizer.token_to_id(config["pad_token"]), pad_token=config["pad_token"])
ids = np.array([encoding.ids for encoding in tokenizer.encode_batch(sys.argv[2:])], dtype=np.int64)

image = np.asarray(onnxruntime.InferenceSession(here / "image.onnx").run(None, {"pixel_values": pixels})[0])
texts = np.asarray(onnxruntime.InferenceSession(here / "text.onnx").run(None, {"input_ids": ids})[0])
cosines = (image @ texts.T)[0]
for row in cosines.argsort()[::-1]:
    print(f"{cosines[row]:.4f}  {sys.argv[2 + row]}")
