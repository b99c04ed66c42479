"""From which layer on does a model know what comes next? A linear probe for each layer, on rows captured by insitu.

python examples/07_linear_probe.py && insitu store ls insitu-store

Each text is a request whose residual stream goes into a store, layer by layer. It is read back, and one logistic
regression a layer tells, at every end of a word, whether the next word begins with a vowel. Half of the texts train the
probes and the other half tests them, so no text is in both.
"""

import argparse
import itertools
import re
import sys
from pathlib import Path
from typing import Any

import altair as alt
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import insitu
from insitu_collector.store import Store, open_store

MODELS = Path(__file__).resolve().parent / "models"
sys.path.insert(0, str(MODELS))
from corpus import texts  # noqa: E402

SEED = 20_261_126
"""Not that of the texts which trained the checkpoint."""


def labelled(tokenizer: Any, text: str) -> tuple[list[int], list[int], list[bool]]:
    """Return the token ids of a text, the positions at which a word ends, and whether the next begins with a vowel."""
    found = tokenizer(text, return_offsets_mapping=True)
    ids = [tokenizer.bos_token_id, *found["input_ids"]]
    words = {word.start(): word[1] in "aeiouAEIOU" for word in re.finditer(r" (\w)", text)}
    nexts = [(at, words[begin]) for at, (begin, _) in enumerate(found["offset_mapping"]) if begin in words]
    return ids, [at for at, _ in nexts], [vowel for _, vowel in nexts]  # with <s> in front, the token before is `at`


def capture(model: Any, requests: dict[str, list[int]], store: str) -> list[str]:
    """Run each request once and store its rows of `L*.resid_post`; return the sites, a layer each."""
    rule = insitu.Rule(sites="L*.resid_post", requests="all")
    with insitu.attach(model, to=f"file://{store}", rules=[rule]) as session:

        def run(request: str) -> None:
            with session.step(rows=[insitu.Rows(request, start=0, count=len(requests[request]))]):
                model(torch.tensor([requests[request]]))

        dropped = session.collect(requests, run).dropped  # waits for the disk instead of dropping rows
        assert not dropped, f"rows are missing: {dropped}"
        return [site.name for site in session.sites() if site.name.endswith(".resid_post")]


def read(store: Store, ends: dict[str, list[int]]) -> dict[str, list[torch.Tensor]]:
    """Return the captured rows at the ends of words, [positions, width] of each request, by site."""
    found: dict[str, list[torch.Tensor]] = {}
    for request, positions in ends.items():
        for site, captured in store.tensors(request, "L*.resid_post", torch=True).items():
            assert not captured.missing, f"{request} at {site}: {captured.missing}"
            found.setdefault(site, []).append(captured.values[positions])
    return found


def fitted(x: torch.Tensor, y: torch.Tensor) -> nn.Linear:
    """Return the logistic regression of y [n] on x [n, width], with a little weight decay."""
    probe = nn.Linear(x.shape[1], 1)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimiser = torch.optim.LBFGS(probe.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        total = nn.functional.binary_cross_entropy_with_logits(probe(x)[:, 0], y)
        total = total + 1e-3 * probe.weight.square().sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    return probe


def accuracy(train: tuple[torch.Tensor, torch.Tensor], test: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Return the share of test rows that a probe of the training rows gets right."""
    (x, y), (seen_x, seen_y) = train, test
    mean, std = x.mean(0), x.std(0) + 1e-6
    probe = fitted((x - mean) / std, y)
    with torch.no_grad():
        return float(((probe((seen_x - mean) / std)[:, 0] > 0) == (seen_y > 0.5)).float().mean())


def plot(by_layer: list[float], baseline: float, out: str) -> None:
    """Draw accuracy by layer; .html, or with vl-convert-python .svg and .png."""
    rows = [{"layer": layer, "accuracy": found} for layer, found in enumerate(by_layer)]
    line = alt.Chart(alt.InlineData(values=rows)).mark_line(point=True, color="#1f5f99")
    line = line.encode(x="layer:O", y=alt.Y("accuracy:Q", scale=alt.Scale(zero=False)))
    rule = alt.Chart(alt.InlineData(values=[{"baseline": baseline}])).mark_rule(color="#c2500a", strokeDash=[4, 4])
    title = alt.TitleParams(
        "Does the next word begin with a vowel?",
        subtitle="held-out accuracy of a linear probe; dashed: always the commoner answer",
    )
    chart = (line + rule.encode(y="baseline:Q")).properties(width=420, height=240, title=title, background="white")
    chart.save(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--texts", type=int, default=120, help="half of them train")
    parser.add_argument("--store", default="./insitu-store")
    parser.add_argument("--out", default="linear_probe.html", help="the plot: .html, .svg or .png")
    asked = parser.parse_args()
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "tiny-llama")
    model = AutoModelForCausalLM.from_pretrained(MODELS / "tiny-llama", dtype=torch.float32).eval()

    stories = itertools.islice((text for text in texts(SEED) if isinstance(text, str)), asked.texts)
    known = {f"text-{number}": labelled(tokenizer, text) for number, text in enumerate(stories)}
    sites = capture(model, {request: ids for request, (ids, _, _) in known.items()}, asked.store)

    labels = [torch.tensor(vowels, dtype=torch.float32) for _, _, vowels in known.values()]
    half = len(known) // 2
    y, seen_y = torch.cat(labels[:half]), torch.cat(labels[half:])
    baseline = float(max(seen_y.mean(), 1 - seen_y.mean()))
    rows = read(open_store(asked.store), {request: ends for request, (_, ends, _) in known.items()})
    by_layer = []
    for site in sites:
        by_layer.append(accuracy((torch.cat(rows[site][:half]), y), (torch.cat(rows[site][half:]), seen_y)))
        print(f"{site:16} {by_layer[-1]:.3f}", flush=True)
    print(f"{'majority':16} {baseline:.3f}   ({len(y):,} rows to train, {len(seen_y):,} to test)")
    plot(by_layer, baseline, asked.out)
    print(asked.out)


if __name__ == "__main__":
    main()
