"""Observe any torch module: three lines, no server. Writes a store and says where.

python examples/01_attach_plain.py && insitu stalls insitu-store
"""

import torch
from torch import nn

import insitu

model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 10)).eval()

with insitu.attach(model, to="file://./insitu-store") as session, torch.inference_mode():
    for _ in range(200):
        model(torch.randn(8, 64))
    print(f"{len(session.sites())} sites: {', '.join(site.name for site in session.sites())}")
    print(session.flush())
