"""What `python -m benchmarks.gpu` runs, with torch, numpy, transformers, safetensors and tiktoken alone.

parts.py     the parts, and how each is asked for and answers
carried.py   text, probe texts and vocabulary in one file; `python -m benchmarks.on_gpu.carried FILE` makes it
recipes.py   the model, its batches and its schedule, of the original and of jobs/record.yaml
step.py      tokens per second of a step beside transformers
probe.py     vectors of AG News' texts and what a classifier makes of them
learn.py     training by a recipe, probed as it goes
figure.py    the curves as PNG
"""
