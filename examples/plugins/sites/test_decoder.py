"""The table keeps its contract, and its names are sums as they are in other decoders."""

import torch
from acme_decoder import AcmeDecoder, AcmeSites

import insitu
from insitu.testing import Recording, check_architecture, expect


def test_it_keeps_the_contract() -> None:
    assert "27 sites of a AcmeDecoder fired" in check_architecture(AcmeSites())


def test_attention_and_mlp_add_up_to_the_residual_stream(insitu_records: Recording) -> None:
    torch.manual_seed(0)
    model = AcmeDecoder()
    names = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    rules = [insitu.Rule(sites=f"L1.{name}", requests="all") for name in names]
    with torch.inference_mode(), insitu.attach(model, to=insitu_records, rules=rules):
        for _ in range(2):  # raw rows are taken from the second step on
            model(torch.arange(7)[None])
    pre, attention, mid, mlp, post = (
        torch.from_numpy(expect(insitu_records).captured(f"L1.{name}", step_id=1)) for name in names
    )
    torch.testing.assert_close(pre + attention, mid)
    torch.testing.assert_close(mid + mlp, post)
