"""Pictures in Python: train on a folder of them and complete the lower half of one.

python examples/pictures.py FOLDER PICTURE [OUT] [TIME]
"""

import sys
from pathlib import Path

import numpy as np

from perceiver_ar import PerceiverARConfig, Run, generate, train
from perceiver_ar.config import DataConfig, Recipe

folder, picture = sys.argv[1:3]
out = sys.argv[3] if len(sys.argv) > 3 else "runs/pictures"
time = sys.argv[4] if len(sys.argv) > 4 else "10m"

model = PerceiverARConfig(num_latents=256, dim=128, num_layers=4, num_heads=2)  # the context is a picture
summary = train(Recipe(paths=(folder,), out=out, max_time=time, model=model, data=DataConfig(image_size=(16, 16))))
print(f"{summary.get('bits_per_dimension', float('nan')):.3f} bits per dimension")

run = Run(out)
codec = run.codec()
original = codec.encode(Path(picture).read_bytes())
half = len(original) // 2
rows = [original[:half].tolist()] * 4
new = generate(run.model(), rows, len(original) - half, seed=0, allowed_next=codec.constraint())
completions = [np.array(row + more) for row, more in zip(rows, new.tolist(), strict=True)]
for path in codec.show(completions, half, run.samples, "completed", original=original):
    print(path)
