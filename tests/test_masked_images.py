"""Masked-image pretraining: what is seen, what the loss is of, and the stage before the labels."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from vitprobe import data

ANALYSES = Path(__file__).parents[1] / "analyses"
# See tests/test_train_family.py for the precision.
TINY = ["--precision", "bf16", "--size", "tiny", "--device", "cpu", "--log-every", "2"]
TINY += ["--batch-size", "16", "--pictures-seen", "64"]
MASKED = ["--pretrain", "masked", "--pretrain-batch-size", "8", "--pretrain-pictures-seen", "32"]


@pytest.fixture
def masked_images(monkeypatch):
    if not ANALYSES.is_dir():
        pytest.skip("the training script is not part of the installed package")
    monkeypatch.syspath_prepend(str(ANALYSES))
    import masked_images

    return masked_images


@pytest.fixture
def family(masked_images):
    import timm.layers
    import train_family

    fused = timm.layers.use_fused_attn()
    yield train_family
    timm.layers.set_fused_attn(bool(fused))


def vit(**options):
    torch.manual_seed(0)
    return timm.create_model(
        "vit_base_patch16_224", img_size=32, patch_size=4, embed_dim=16, depth=2, num_heads=4,
        num_classes=10, **options,
    )  # fmt: skip


GAP = {"class_token": False, "global_pool": "avg"}


@pytest.mark.parametrize("options", [{}, GAP])
def test_a_quarter_of_the_patches_is_seen_others_at_each_pass(masked_images, options):
    network, lengths = vit(**options), []
    network.blocks[0].register_forward_hook(lambda m, args, out: lengths.append(out.shape[1]))
    images = torch.randn(5, 3, 32, 32)
    with masked_images.masking(network):
        network.forward_features(images)
        first = network.patch_drop.kept
        network.forward_features(images)
        second = network.patch_drop.kept
    network.forward_features(images)
    prefix = 0 if options else 1
    assert lengths == [16 + prefix, 16 + prefix, 64 + prefix]
    seen = [set(row.tolist()) for row in torch.cat([first, second])]
    assert all(len(kept) == 16 and kept <= set(range(64)) for kept in seen)
    assert len({frozenset(kept) for kept in seen}) == 10


def test_only_the_kept_patches_decide_what_the_network_makes_of_an_image(masked_images):
    network, images = vit(), torch.randn(1, 3, 32, 32)

    def made_of(images):
        torch.manual_seed(1)
        return network.forward_features(images).detach(), network.patch_drop.kept[0].tolist()

    with masked_images.masking(network):
        tokens, kept = made_of(images)
        for patch in range(64):
            changed = images.clone()
            row, column = 4 * (patch // 8), 4 * (patch % 8)
            changed[:, :, row : row + 4, column : column + 4] += 1
            same = torch.equal(made_of(changed)[0], tokens)
            assert same == (patch not in kept)


def test_targets_are_the_pixels_of_each_patch_at_mean_0_and_variance_1(masked_images):
    images = torch.randn(2, 3, 32, 32) * 5 + 3
    found = masked_images.targets(images, (4, 4)).numpy()
    patch = images[1, :, 4:8, 8:12].numpy()  # second row of patches, third column
    expected = (patch - patch.mean()) / patch.std(ddof=1)
    np.testing.assert_allclose(found[1, 8 + 2], expected.ravel(), atol=1e-4)
    np.testing.assert_allclose(found.mean(-1), 0, atol=1e-5)
    flat = masked_images.targets(torch.ones(1, 3, 32, 32), (4, 4))
    assert torch.equal(flat, torch.zeros(1, 64, 48))


def test_the_loss_is_of_the_patches_left_out_alone(masked_images):
    network, images = vit(), torch.randn(3, 3, 32, 32)

    def off_by(on_unseen, on_kept):
        def decoder(tokens, kept):
            offset = torch.full((3, 64, 1), float(on_unseen))
            offset[torch.arange(3)[:, None], kept] = on_kept
            return masked_images.targets(images, (4, 4)) + offset

        return masked_images.masked_loss(network, decoder, images).item()

    def zeros(tokens, kept):
        return torch.zeros(3, 64, 48)

    with masked_images.masking(network):
        assert off_by(2, 100) == pytest.approx(4, rel=1e-5)
        assert off_by(0, 100) == pytest.approx(0, abs=1e-9)
        # Variance 1 with one degree of freedom less: 47 of 48 in the mean of squares.
        nothing = masked_images.masked_loss(network, zeros, images).item()
        assert nothing == pytest.approx(47 / 48, rel=1e-4)


def test_the_decoder_puts_each_token_at_its_place_and_the_mask_elsewhere(masked_images):
    network = vit()
    decoder = masked_images.Decoder(network)
    tokens, kept = torch.randn(1, 3, 16), torch.tensor([[5, 60]])  # class token and two patches
    seen = []
    decoder.blocks[0].register_forward_pre_hook(lambda m, args: seen.append(args[0][0]))
    decoder(tokens, kept)
    embedded = decoder.embed(tokens)[0]
    expected = decoder.mask_token[0] + decoder.places
    expected[5], expected[60] = (
        embedded[i + 1] + decoder.places[at] for i, at in ((0, 5), (1, 60))
    )
    torch.testing.assert_close(seen[0], torch.cat([embedded[:1], expected]))
    assert len(torch.unique(decoder.places, dim=0)) == 64
    assert len(decoder.blocks) == 2 and decoder.embed.out_features == 64


def run(family, tmp_path, *arguments, name="net"):
    family.main([name, *TINY, *MASKED, "--out", str(tmp_path), *arguments])
    return {
        file.stem: torch.load(file, weights_only=True) for file in (tmp_path / name).glob("*.pt")
    }


@pytest.mark.parametrize("pool", ["cls", "gap"])
def test_runs_interrupted_in_either_stage_end_with_the_same_weights(family, tmp_path, pool):
    whole = run(family, tmp_path / "a", "--pool", pool)
    for stop in ("3", "4", "7"):  # among masked images, at their end, among labels
        run(family, tmp_path / "b", "--pool", pool, "--stop-after", stop)
        assert (tmp_path / "b" / "net" / "checkpoint.pt").exists() == (stop == "7")
    resumed = run(family, tmp_path / "b", "--pool", pool)
    assert [state["step"] for state in whole.values()] == [4, 4]
    for stage in ("masked", "checkpoint"):
        for part in ("module", "decoder") if stage == "masked" else ("module",):
            for key, value in whole[stage][part].items():
                assert torch.equal(resumed[stage][part][key], value), (stage, key)
        log, resumed_log = whole[stage]["log"], resumed[stage]["log"]
        for key in {"test_loss", "test_accuracy"} & set(log[-1]):
            assert log[-1][key] == resumed_log[-1][key]
        minutes = [entry["minutes"] for entry in resumed_log]
        assert minutes == sorted(minutes) and minutes[0] > 0
    lines = (tmp_path / "a" / "net" / "masked.jsonl").read_text().splitlines()
    assert [json.loads(line)["pictures_seen"] for line in lines] == [16, 32]
    with pytest.raises(SystemExit, match=r"masked\.pt was trained by another recipe"):
        run(family, tmp_path / "a", "--pool", pool, "--pretrain-learning-rate", "0.5")


def test_labels_begin_with_the_weights_of_the_masked_stage(family, tmp_path):
    states = run(family, tmp_path, "--learning-rate", "0")
    pretrained, own = states["masked"]["module"], states["checkpoint"]["module"]
    assert set(pretrained) == set(own)
    for key, value in own.items():
        assert torch.equal(value, pretrained[key]), key
    begun = data.build(states["checkpoint"]["card"], trained=False).state_dict()
    moved = [key for key in own if not torch.equal(own[key], begun[key])]
    assert any("blocks.1.attn" in key for key in moved)
    # The checkpoint of the masked stage is a start of its own, too.
    source = str(tmp_path / "net" / "masked.pt")
    still = ["--learning-rate", "0", "--start-from", source, "--out", str(tmp_path)]
    family.main(["other", *TINY, *still])
    other = torch.load(tmp_path / "other" / "checkpoint.pt", weights_only=True)
    assert other["card"]["recipe"]["start"] == "net after 32 images"
    assert torch.equal(other["module"]["pos_embed"], own["pos_embed"])


def test_the_card_tells_of_both_stages(family, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "_HERE", tmp_path)
    monkeypatch.setattr(family, "TEST_PICTURES", 200)
    little = ["--train-size", "8", "--pretrain-pictures-seen", "36", "--export"]
    states = run(family, tmp_path, *little)
    card = data.load_card("net")
    assert card["pretraining"]["pictures_seen"] == 32 and card["pictures_seen"] == 64
    assert card["pretraining"]["distinct_pictures"] == card["recipe"]["distinct_pictures"] == 8
    assert "75% of the patches" in card["pretraining"]["objective"]
    assert card["pretraining"]["optimizer"].startswith("AdamW, betas 0.9 and 0.95")
    assert card["recipe"]["start"] == "masked pretraining on 8 images, 4 times each"
    assert set(card["minutes"]) == {"masked", "labels"} and card["test_n"] == 200
    assert card["masked_test_loss"] == states["masked"]["log"][-1]["test_loss"]
    assert card["position_init_std"] == 0.02
    # A stage that is done is not done again for other labels, nor a network for the same recipe.
    before = (tmp_path / "net" / "masked.pt").stat().st_mtime_ns
    (tmp_path / "net" / "checkpoint.pt").unlink()
    run(family, tmp_path, *little, "--learning-rate", "0.5")
    assert (tmp_path / "net" / "masked.pt").stat().st_mtime_ns == before
    run(family, tmp_path, *little, "--learning-rate", "0.5")
    assert "net: trained by this recipe already" in capsys.readouterr().out


def test_with_little_data_both_stages_see_the_same_few_images(family, tmp_path, monkeypatch):
    seen, batch = set(), family.SceneStream.batch

    def watched(self, start, n):
        images, labels = batch(self, start, n)
        seen.update(image.tobytes() for image in images)
        return images, labels

    monkeypatch.setattr(family.SceneStream, "batch", watched)
    run(family, tmp_path, "--train-size", "12")
    assert len(seen) == 12


def test_members_begin_with_weights_of_their_own_and_only_vits_are_masked(family):
    seeds = [member["seed"] for member in family.MEMBERS.values()]
    assert len(set(seeds)) == len(seeds)
    for name, member in family.MEMBERS.items():
        options = family.parse([name])
        assert (options.pretrain == "masked") == (options.model == "vit") == name.startswith("vit")
        assert options.seed == member["seed"] and options.start_from is None


def test_the_whole_family_is_trained_in_turn(family, tmp_path, monkeypatch):
    members = {"one": {"pretrain": "masked", "seed": 1}, "two": {"model": "resnet", "seed": 2}}
    monkeypatch.setattr(family, "MEMBERS", members)
    monkeypatch.setattr(family, "TEST_PICTURES", 200)
    monkeypatch.setattr(data, "_HERE", tmp_path)
    few = ["--pretrain-pictures-seen", "128", "--out", str(tmp_path), "--export"]
    family.main(["--all", *TINY, *few])
    assert data.names() == ["one", "two"]
    assert [(tmp_path / name / "masked.pt").exists() for name in members] == [True, False]
    assert "pretraining" not in data.load_card("two")


@pytest.mark.parametrize("other", [["--model", "resnet"], ["--start-from", "vit_small_box"]])
def test_a_masked_stage_is_for_a_vit_with_random_weights(family, capsys, other):
    with pytest.raises(SystemExit):
        family.parse(["net", "--pretrain", "masked", *other])
    assert "--pretrain is for a ViT that begins with random weights" in capsys.readouterr().err


def test_curves_are_of_both_stages_and_what_was_not_trained_anew_keeps_its_own(
    masked_images, tmp_path
):
    import training_curves

    stem, runs = tmp_path / "curves", tmp_path / "runs"
    np.savez(stem.with_suffix(".npz"), old=np.ones((2, 3)), new=np.zeros((5, 3)))
    (runs / "new").mkdir(parents=True)
    entry = {"pictures_seen": 64, "loss": 2.5, "test_accuracy": 0.25, "minutes": 1.0}
    masked = {"pictures_seen": 128, "loss": 0.75, "test_loss": 0.5, "minutes": 1.0}
    (runs / "new" / "log.jsonl").write_text(json.dumps(entry) + "\n")
    (runs / "new" / "masked.jsonl").write_text(json.dumps(masked) + "\n")
    training_curves.main([str(runs)], stem)
    curves = dict(np.load(stem.with_suffix(".npz")))
    assert {name: curve.tolist() for name, curve in curves.items()} == {
        "old": [[1, 1, 1]] * 2,
        "new": [[64, 2.5, 0.25]],
        "new_masked": [[128, 0.75, 0.5]],
    }
    assert [len(one.lines) for one in training_curves.draw(curves).axes] == [2, 2, 3]
    assert stem.with_suffix(".png").stat().st_size > 1000
