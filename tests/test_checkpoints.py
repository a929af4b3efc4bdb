"""Public DDPM checkpoints as the unpruned network."""

import pytest
import torch
from conftest import unet
from safetensors.torch import save_file

from ebdiff.nets.checkpoints import load_checkpoint
from ebdiff.nets.store import fresh
from ebdiff.system.errors import UserError

SMALL = unet(8, width=16, multipliers=(1, 2), blocks=1, attention=(4,), norm_groups=4)


@pytest.fixture
def weights():
    return {name: p.detach().clone() for name, p in fresh(SMALL, 0, "test").named_parameters()}


def same(found, weights):
    return found.keys() == weights.keys() and all(torch.equal(found[n], weights[n]) for n in weights)


@pytest.mark.parametrize("wrap", [dict, lambda w: {"state_dict": w}, lambda w: {"model": {}, "ema": w}])
def test_state_dicts_load_alone_or_under_a_key(tmp_path, weights, wrap):
    torch.save(wrap(weights), tmp_path / "model.ckpt")
    assert same(load_checkpoint(tmp_path / "model.ckpt", SMALL), weights)


def test_ddims_training_list_gives_the_average(tmp_path, weights):
    raw = {f"module.{n}": w + 1 for n, w in weights.items()}
    average = {f"module.{n}": w for n, w in weights.items()}
    torch.save([raw, {"state": {}, "param_groups": []}, 3, 1000, average], tmp_path / "ckpt.pth")
    assert same(load_checkpoint(tmp_path / "ckpt.pth", SMALL), weights)


def test_safetensors_load(tmp_path, weights):
    save_file(weights, tmp_path / "model.safetensors")
    assert same(load_checkpoint(tmp_path / "model.safetensors", SMALL), weights)


@pytest.mark.parametrize(
    "change", [{"width": 32}, {"blocks": 2}, {"multipliers": (1, 2, 2), "attention": ()}]
)
def test_checkpoint_of_another_network_is_one_line(tmp_path, weights, change):
    save_file(weights, tmp_path / "model.safetensors")
    other = SMALL._replace(config=SMALL.config.model_copy(update=change))
    with pytest.raises(UserError, match=r"model\.safetensors: a checkpoint of another network: .*network"):
        load_checkpoint(tmp_path / "model.safetensors", other)


def test_nothing_in_a_file_is_executed(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"state_dict": Hostile()}, tmp_path / "model.ckpt")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path / "model.ckpt", SMALL)
    assert not (tmp_path / "executed").exists()


def test_missing_and_damaged_files_are_one_line(tmp_path):
    with pytest.raises(UserError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "none.ckpt", SMALL)
    for name in ("model.ckpt", "model.safetensors"):
        (tmp_path / name).write_bytes(b"not a checkpoint")
        with pytest.raises(UserError, match="not a readable checkpoint"):
            load_checkpoint(tmp_path / name, SMALL)
