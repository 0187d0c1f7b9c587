"""Piano in Python: train on a folder of MIDI files, go on from one of them, and write MIDI, sound and a piano roll.

python examples/piano.py FOLDER PROMPT.mid [OUT] [TIME]
"""

import sys
from pathlib import Path

import numpy as np

from perceiver_ar import PerceiverARConfig, Run, generate, train
from perceiver_ar.config import DataConfig, Recipe, TrainerConfig

folder, prompt_file = sys.argv[1:3]
out = sys.argv[3] if len(sys.argv) > 3 else "runs/piano"
time = sys.argv[4] if len(sys.argv) > 4 else "10m"

model = PerceiverARConfig(context_length=1024, num_latents=128, dim=256, num_layers=4, num_heads=2)
data = DataConfig(group_by="(.*)__")  # Piece__Performer.mid: a piece is trained on or measured on, never both
summary = train(Recipe(paths=(folder,), out=out, max_time=time, model=model, data=data, trainer=TrainerConfig()))
print(f"{summary['nats_per_note']:.2f} nats per note")

run = Run(out)
codec = run.codec()
prompt = [*codec.separator, *codec.encode(Path(prompt_file).read_bytes())[:500].tolist()]
new = generate(run.model(), [prompt], 500, temperature=0.9, seed=0, allowed_next=codec.constraint())
for path in codec.show([np.array(prompt + new[0].tolist())], len(prompt), run.samples, "continued"):
    print(path)
