"""Sound in Python: train on a folder of recordings, sample by sample, and go on from one of them.

python examples/recordings.py FOLDER RECORDING [OUT] [TIME]
"""

import sys
from pathlib import Path

import numpy as np

from perceiver_ar import PerceiverARConfig, Run, generate, train
from perceiver_ar.config import DataConfig, Recipe

folder, recording = sys.argv[1:3]
out = sys.argv[3] if len(sys.argv) > 3 else "runs/recordings"
time = sys.argv[4] if len(sys.argv) > 4 else "10m"

model = PerceiverARConfig(context_length=2048, num_latents=256, dim=128, num_layers=4, num_heads=2)
data = DataConfig(audio_codec="mulaw", sample_rate=8000)  # "encodec", "dac" or "mimi" for a neural codec's codes
summary = train(Recipe(paths=(folder,), out=out, max_time=time, model=model, data=data))
print(f"{summary.get('nats_per_second', float('nan')):.0f} nats per second")

run = Run(out)
codec = run.codec()
prompt = [*codec.separator, *codec.encode(Path(recording).read_bytes())[:4000].tolist()]
new = generate(run.model(), [prompt], 2000, seed=0, allowed_next=codec.constraint())
for path in codec.show([np.array(prompt + new[0].tolist())], len(prompt), run.samples, "continued"):
    print(path)
