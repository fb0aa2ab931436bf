"""Networks that travel with their figures, figures that name their run files, outcomes that can be computed again."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from matplotlib.figure import Figure

import nsq_repro
from nsq_repro import archive, cli, evaluation, experiments, mnist, networks, records, rerun, results, training, weights
from nsq_repro.data import load
from nsq_repro.experiments import AttackParameters, accuracy_record, decide
from nsq_repro.tables import training_table

SMALL = dict(models=("natural", "nsq"), n_test=20, steps=3, eps=(0.0, 0.1, 0.3))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A home with a small real run at scale smoke, its figures and its networks."
    home = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NSQ_HOME", str(home))
        few = {m: dict(iterations=8, batch_size=20, lr=1e-3) for m in SMALL["models"]}
        preset = {**mnist.PRESETS["smoke"], **SMALL, "training": few}
        p = decide("mnist", {"smoke": preset}, AttackParameters(scale="smoke", device="cpu"))
        _, _, trained, evaluated, cost = experiments.train_and_attack(AttackParameters(), p, {}, 1)
        weights.keep_networks("mnist", "smoke", trained)
        record = accuracy_record(p, trained, evaluated, cost)
        results.Results("smoke").figure("fig3", record)
    return home


@pytest.fixture
def home(made, tmp_path, monkeypatch):
    "A copy of it to spoil, whose figure need not be drawn again: test_claims.py sees what is drawn otherwise."
    monkeypatch.setattr(results, "check_figure", lambda path, record: ([], "not redrawn"))
    shutil.copytree(made, tmp_path / "home")
    monkeypatch.setenv("NSQ_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def figure(home):
    return home / "figures" / "smoke" / "fig3.json"


def problems(path):
    return results.check_file(path)["problems"]


def test_what_rounding_changed_stands_beside_each_training(home):
    "In the figure's record, and in the page's table."
    record = records.load_json(figure(home))
    for r in record["training"].values():
        assert r["rounding"]["n"] > 0
        assert f"{r['rounding']['changed']:,} of {r['rounding']['n']:,}" in training_table(record)


def change(path, edit):
    "Change a record in place, with a digest that fits."
    record = json.loads(path.read_text())
    edit(record)
    records.save_record(path, record)


def run_of(home, model):
    "Folder of a training."
    return home / "runs" / f"train-{json.loads(figure(home).read_text())['training'][model]['hash']}"


# ---- rounding


def test_trained_weights_are_bfloat16_numbers_in_half_the_bytes(home):
    for model in SMALL["models"]:
        path = run_of(home, model) / "model.safetensors"
        net, _ = networks.load_checkpoint(path)
        floating = [t for t in net.state_dict().values() if t.is_floating_point()]
        assert all(t.dtype == torch.float32 and torch.equal(t, t.bfloat16().float()) for t in floating)
        assert path.stat().st_size < 2.01 * sum(t.numel() for t in floating) + 4000
        assert records.load_json(path.with_name("record.json"))["weights"] == training.ROUNDED


def test_rounding_is_to_the_nearest_and_reaches_the_buffers():
    net = torch.nn.BatchNorm1d(2)
    net.running_mean[:] = torch.tensor([1 + 2**-9, 1 + 3 * 2**-9])  # between 1, 1 + 2^-7 and so on: halfway, to even
    net.running_var[:] = torch.tensor([1 + 2**-8 + 2**-12, 1.5])
    assert not networks.are_rounded(net.state_dict())
    networks.round_weights(net)
    assert net.running_mean.tolist() == [1.0, 1 + 2**-7] and net.running_var.tolist() == [1 + 2**-7, 1.5]
    assert networks.are_rounded(net.state_dict()) and net.num_batches_tracked.dtype == torch.int64


def test_what_is_not_rounded_keeps_its_bytes(tmp_path):
    net = networks.build("mnist_cnn_pytorch", seed=1)
    loaded, _ = networks.load_checkpoint(networks.save_checkpoint(tmp_path / "m", net))
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), loaded.state_dict().values()))


# ---- networks that travel


def test_load_model_gives_the_network_that_was_attacked(home):
    shutil.rmtree(home / "runs")
    net = nsq_repro.load_model("mnist-nsq", "smoke")
    rows = [e for e in json.loads(figure(home).read_text())["evaluations"] if e["model"] == "nsq"]
    assert not net.training and {e["weights"] for e in rows} == {networks.weights_digest(net.state_dict())}
    data = load("digits").subset(20)
    clean = net(data.floats()).argmax(1) == data.y
    series = json.loads(figure(home).read_text())["series"]
    kept = next(s for s in series if (s["model"], s["accounting"]) == ("nsq", "last"))
    assert clean.tolist() == records.unpack(kept["outcomes"][0], 20).tolist()


def test_root_is_any_checkout(home, tmp_path, monkeypatch):
    monkeypatch.setenv("NSQ_HOME", str(tmp_path / "elsewhere"))
    assert nsq_repro.load_model("mnist-natural", "smoke", root=home).training is False
    with pytest.raises(ValueError, match="there are none in .*elsewhere"):
        nsq_repro.load_model("mnist-natural", "smoke")


def test_unknown_names_are_answered_with_the_nearest(home):
    with pytest.raises(ValueError, match="did you mean 'mnist-nsq'.*mnist-natural, mnist-nsq") as e:
        nsq_repro.load_model("mnist-nqs", "smoke")
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="smoke, cpu, paper"):
        nsq_repro.load_model("mnist-nsq", "smok")


def test_a_changed_network_or_record_is_refused(home):
    file = home / "figures" / "smoke" / "weights" / "mnist-nsq.safetensors"
    good = file.read_bytes()
    net, meta = networks.load_checkpoint(file)
    with torch.no_grad():
        next(net.parameters()).flatten()[0] += 1
    networks.save_checkpoint(file, net, {"spec": meta["spec"]})  # whole in itself, but another network
    with pytest.raises(ValueError, match="git checkout"):
        nsq_repro.load_model("mnist-nsq", "smoke")
    assert "mnist-nsq.safetensors" in problems(file.with_suffix(".json"))[0]
    assert cli.main(["verify", "--scale", "smoke"]) == 1
    file.write_bytes(good)
    assert nsq_repro.load_model("mnist-nsq", "smoke") and not problems(file.with_suffix(".json"))
    change(file.with_suffix(".json"), lambda r: r["spec"].update(seed=7))
    with pytest.raises(ValueError, match="another network"):
        nsq_repro.load_model("mnist-nsq", "smoke")


def test_list_names_networks(home, capsys):
    assert cli.main(["list"]) == 0
    said = capsys.readouterr().out
    assert "mnist-natural" in said and "mnist-nsq" in said and "load_model" in said
    assert cli.main(["list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [n["network"] for n in listed["networks"]] == ["mnist-natural", "mnist-nsq"]
    assert [f["item"] for f in listed["figures"]] == ["fig3"]


def trainings(home):
    return [records.load_json(run_of(home, m) / "record.json") for m in SMALL["models"]]


def test_too_large_networks_stay(home, monkeypatch):
    kept = sorted(home.glob("figures/*/weights/*"))
    size = sum(f.stat().st_size for f in kept if f.suffix == ".safetensors")
    monkeypatch.setattr(weights, "LIMIT", size)
    weights.keep_networks("mnist", "smoke", trainings(home))  # in the place of themselves there is room
    with pytest.raises(ValueError, match="at most") as e:
        weights.keep_networks("more", "smoke", trainings(home))
    assert "\n" not in str(e.value) and sorted(home.glob("figures/*/weights/*")) == kept


def test_unrounded_and_uncommitted_networks_stay(home, monkeypatch):
    r = trainings(home)[1]
    with pytest.raises(ValueError, match="uncommitted changes"):
        weights.keep_networks("mnist", "cpu", [{**r, "provenance": {**r["provenance"], "dirty": True}}])
    monkeypatch.setattr(weights, "are_rounded", lambda tensors: False)
    with pytest.raises(ValueError, match="before weights were rounded"):
        weights.keep_networks("mnist", "smoke", [r])
    assert not (home / "figures" / "cpu").exists()


def test_a_run_keeps_its_networks_beyond_smoke_and_goes_on_where_it_cannot(home, monkeypatch, capsys):
    called = []
    monkeypatch.setattr(experiments, "keep_networks", lambda *a: called.append(a[:2]))
    monkeypatch.setattr(experiments, "recipe_costs", lambda *a: {})
    few = {m: dict(iterations=8, batch_size=20, lr=1e-3) for m in SMALL["models"]}
    preset = {**mnist.PRESETS["smoke"], **SMALL, "training": few}

    def run(scale, **given):
        p = decide("mnist", {scale: preset}, AttackParameters(scale=scale, device="cpu", **given))
        return experiments.train_and_attack(AttackParameters(), p, {}, 1)

    run("smoke"), run("cpu"), run("cpu", models="nsq")  # the last is a variant
    assert called == [("mnist", "cpu")]

    def refuse(*a):
        raise ValueError("too large")

    monkeypatch.setattr(experiments, "keep_networks", refuse)
    assert len(run("cpu").trained) == 2 and "too large" in capsys.readouterr().out


def test_import_loads_nothing():
    code = "import sys, nsq_repro; assert 'load_model' in dir(nsq_repro) and 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0



# ---- run files that travel


def travelled(home):
    "A home as a fresh clone has it: figures, networks and the archive, nothing under runs/."
    archive.keep_runs("smoke")
    shutil.rmtree(home / "runs")


def test_restored_runs_are_found_by_the_run_that_made_them(home, monkeypatch, capsys):
    listed = {r["hash"] for r in json.loads(figure(home).read_text())["evaluations"]}
    texts = {p.parent.name: p.read_text() for p in home.glob("runs/*/record.json")}
    travelled(home)
    assert cli.main(["restore", "--scale", "smoke"]) == 0
    assert f"{len(texts)} runs put under" in capsys.readouterr().out
    assert {p.parent.name: p.read_text() for p in home.glob("runs/*/record.json")} == texts
    few = {m: dict(iterations=8, batch_size=20, lr=1e-3) for m in SMALL["models"]}
    preset = {**mnist.PRESETS["smoke"], **SMALL, "training": few}
    p = decide("mnist", {"smoke": preset}, AttackParameters(scale="smoke"))
    monkeypatch.setattr(training, "_loop", None)  # nothing may be trained
    monkeypatch.setattr(evaluation, "outcomes_at", None)  # nor attacked
    _, _, evaluated = experiments.run_protocol(p, load("digits", "train"), load("digits"), progress=False)
    assert {r["hash"] for r in evaluated} == listed


def test_verify_follows_the_chain_into_the_archive(home):
    travelled(home)
    said = results.check_file(figure(home))
    assert not said["problems"] and "11 of 11 run files here and unchanged" in said["said"]
    change(figure(home), lambda r: r["runs"][1]["digests"].reverse() or r["runs"][-2]["digests"].reverse())
    assert any("the archive's eval-" in p for p in problems(figure(home)))


def test_a_training_without_its_network_is_restored_and_verified(home, capsys):
    "Networks of grids do not travel; what was measured of them does."
    kept = records.load_record(next((home / "figures/smoke/weights").glob("*nsq.json")))
    name = kept["training"]["hash"]
    travelled(home)
    shutil.move(home / "figures/smoke/weights", home / "elsewhere")
    assert cli.main(["restore", "--scale", "smoke"]) == 0
    out = capsys.readouterr().out
    assert f"{len(list(home.glob('runs/train-*')))} are trainings without their networks" in out
    assert not results.check_file(figure(home))["problems"] and not list(home.glob("runs/*/model.safetensors"))
    row = next(r for r in json.loads(figure(home).read_text())["evaluations"] if r["train_hash"] == name)
    assert rerun.find_network(row, "smoke") is None
    with pytest.raises(FileNotFoundError, match="not there yet"):
        training.train(training.TrainSpec(**kept["spec"]), load("digits", "train"), compute=False)
    shutil.move(home / "elsewhere", home / "figures/smoke/weights")
    assert cli.main(["restore", "--scale", "smoke"]) == 0 and "without their" not in capsys.readouterr().out
    assert rerun.find_network(row, "smoke") is not None


def test_a_changed_archive_is_refused(home, capsys):
    travelled(home)
    path = archive.archive_path("smoke")
    texts = archive.archived_runs("smoke")
    name = next(n for n in texts if n.startswith("eval"))
    path.write_bytes(archive._zipped({**texts, name: texts[name].replace('"last"', '"lost"', 1)}))
    assert results.check_archive(path)["problems"] and cli.main(["restore", "--scale", "smoke"]) == 1
    assert f"{name} in {path} was changed" in capsys.readouterr().err
    path.write_bytes(path.read_bytes()[:100])
    assert "damaged" in results.check_archive(path)["problems"][0]
    path.unlink()
    assert cli.main(["restore", "--scale", "smoke"]) == 1 and "no run files travel" in capsys.readouterr().err


def test_finished_runs_without_a_figure_travel_when_asked(home, capsys):
    change(figure(home), lambda r: r["runs"].pop())  # the timing
    assert cli.main(["keep", "--scale", "smoke", "--unlisted"]) == 0 and "11 run files in" in capsys.readouterr().out
    assert "1 of them in no figure yet" in results.check_archive(archive.archive_path("smoke"))["said"]
    assert cli.main(["keep", "--scale", "smoke"]) == 0 and len(archive.archived_runs("smoke")) == 10
    change(run_of(home, "nsq") / "record.json", lambda r: r.update(hash="0" * 16))
    assert cli.main(["keep", "--scale", "smoke"]) == 0 and len(archive.archived_runs("smoke")) == 10  # as it was


# ---- from a figure to its run files


def test_a_figure_names_its_run_files(home):
    record = json.loads(figure(home).read_text())
    assert {r["part"] for r in record["runs"]} == {"training", "curves", "timing"}
    there = [*home.glob("runs/train-*/record.json"), *home.glob("runs/eval-*/record.json")]
    there += home.glob("runs/timing-*/record.json")
    listed = [d for r in record["runs"] for d in r["digests"]]
    assert sorted(listed) == sorted(records.load_json(p)["digest"] for p in there) and len(listed) == 2 + 8 + 1
    found = results.check_file(figure(home))
    assert not found["problems"] and "11 of 11 run files here and unchanged" in found["said"]
    shutil.rmtree(home / "runs")
    found = results.check_file(figure(home))
    assert not found["problems"] and "0 of 11 run files here" in found["said"]


def spoil_provenance(home):
    path = next(home.glob("runs/eval-*/record.json"))
    path.write_text(path.read_text().replace('"threads": ', '"threads": 1'))


def spoil_signed(home):
    change(next(home.glob("runs/eval-*/record.json")), lambda r: r["provenance"].update(threads=99))


def spoil_outcome(home):
    change(next(home.glob("runs/eval-*/record.json")), lambda r: r["series"][0].update(accuracy=[1.0, 1.0, 1.0]))


def spoil_checkpoint(home):
    path = run_of(home, "nsq") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-2] + b"\x00\x00")


def spoil_training(home):
    change(run_of(home, "natural") / "record.json", lambda r: r.update(seconds=1.0))


def spoil_timing(home):
    change(next(home.glob("runs/timing-*/record.json")), lambda r: r.update(seconds=1.0))


SPOIL = (spoil_provenance, spoil_signed, spoil_outcome, spoil_checkpoint, spoil_training, spoil_timing)


def test_what_was_made_is_verified(made, monkeypatch, capsys):
    monkeypatch.setenv("NSQ_HOME", str(made))
    assert cli.main(["verify", "--scale", "smoke"]) == 0 and ", redrawn" in capsys.readouterr().out


@pytest.mark.parametrize("spoil", SPOIL, ids=lambda f: f.__name__)
def test_a_changed_run_file_is_found(home, spoil, capsys):
    spoil(home)
    assert problems(figure(home))
    assert cli.main(["verify", "--scale", "smoke"]) == 1 and "runs/" in capsys.readouterr().out


def test_parts_of_different_commits_show(home):
    def edit(r):
        for i, part in enumerate(r["runs"]):
            part["commits"] = [{"commit": f"{i}" * 40, "dirty": False, "files": len(part["digests"])}]

    change(figure(home), edit)
    assert "000000000" in (said := results.check_file(figure(home))["said"]) and "111111111" in said
    assert "Made by 000000000" in records.caption(json.loads(figure(home).read_text()))


@pytest.mark.parametrize("where", ["training", "evaluations", "cost"])
def test_uncommitted_changes_are_refused_beyond_smoke(home, where, monkeypatch):
    monkeypatch.setattr(results, "draw", lambda item, record: Figure(figsize=(1, 1)))
    record = json.loads(figure(home).read_text())
    assert results.Results("smoke").figure("fig3", {**record, "dirty": True})
    clean = json.loads(json.dumps(record).replace('"dirty": true', '"dirty": false'))
    part = clean[where]["nsq"] if where == "training" else clean[where][0] if where == "evaluations" else clean[where]
    results.Results("cpu").figure("fig3", clean)
    part["provenance"]["dirty"] = True
    for save in (results.Results("cpu").figure, results.Results("cpu").table):
        with pytest.raises(ValueError, match="uncommitted changes") as e:
            save("fig3" if save.__name__ == "figure" else "mnist-accuracy", clean)
        assert "\n" not in str(e.value)


def test_verify_lists_uncommitted_changes_and_stays_green(home, capsys):
    change(figure(home), lambda r: r["provenance"].update(dirty=True))
    assert cli.main(["verify", "--scale", "smoke"]) == 0
    assert "computed with uncommitted changes: smoke/fig3.json" in capsys.readouterr().out


# ---- computed again


ALL = 10**6


def red(capsys, *more):
    "Exit status and text of the command, all outcomes computed again."
    status = cli.main(["verify", "--scale", "smoke", "--rerun", str(ALL), *more])
    return status, capsys.readouterr().out


def test_every_outcome_comes_out_again(home):
    (found,) = rerun.rerun(ALL, scale="smoke")
    assert found["compared"] == 2 * 8 * 3 * 20 and not found["problems"]  # accountings, curves, radii, images
    shutil.rmtree(home / "runs")  # from the networks beside the figures
    (again,) = rerun.rerun(ALL, scale="smoke")
    assert again == found


def test_the_draw_follows_its_seed_and_batches(home):
    change(figure(home), lambda r: [e.update(batch_size=7) for e in r["evaluations"]])
    curves, problems, lacks = rerun.curves_of(figure(home))
    assert len(curves) == 8 and not problems and not lacks
    first, same, other = (rerun.drawn(curves, 3, seed) for seed in (0, 0, 1))
    assert first == same != other and 1 <= len(first) <= 3 and {f % 7 for _, _, f in [*first, *other]} == {0}
    whole = rerun.drawn(curves, ALL)
    assert whole == [(c, k, f) for c in range(8) for k in range(3) for f in (0, 7, 14)]


@pytest.mark.parametrize("accounting", ["last", "worst"])
def test_a_changed_outcome_is_found(home, accounting, capsys):
    def edit(r):
        s = next(s for s in r["series"] if s["accounting"] == accounting and s["model"] == "nsq")
        for k in range(3) if accounting == "worst" else (1,):  # an image lost stays lost
            bits = records.unpack(s["outcomes"][k], 20)
            bits[4] = not bits[4] if accounting == "last" else not records.unpack(s["outcomes"][0], 20)[4]
            s["outcomes"][k] = records.pack(bits)
            s["correct"][k], s["accuracy"][k] = int(bits.sum()), bits.mean().item()

    change(figure(home), edit)
    status, said = red(capsys)
    assert status == 1 and f"{accounting}: 1 of 20 outcomes differ (images 4)" in said


def test_a_changed_weight_is_found(home, capsys):
    for path in (run_of(home, "nsq") / "model.safetensors", home / "figures/smoke/weights/mnist-nsq.safetensors"):
        net, meta = networks.load_checkpoint(path)
        with torch.no_grad():
            next(net.parameters()).flatten()[0] += 1
        networks.save_checkpoint(path, net, {"spec": meta["spec"]})
        record = path.with_name("record.json") if path.stem == "model" else path.with_suffix(".json")
        change(record, lambda r, path=path: r.update(files={path.name: records.file_digest(path)}))  # all signed anew
    (found,) = rerun.rerun(ALL, scale="smoke")
    assert any("not the network that was attacked" in p for p in found["problems"])
    assert red(capsys)[0] == 1


def test_other_weights_give_other_outcomes(home):
    "Where a record does not say which weights they were, the outcomes say it."
    path = run_of(home, "nsq") / "model.safetensors"
    net, meta = networks.load_checkpoint(path)
    with torch.no_grad():
        for p in net.parameters():
            p.neg_()
    networks.save_checkpoint(path, net, {"spec": meta["spec"]})
    change(path.with_name("record.json"), lambda r: r.update(files={path.name: records.file_digest(path)}))
    change(figure(home), lambda r: [e.pop("weights") for e in r["evaluations"]])
    (found,) = rerun.rerun(ALL, scale="smoke")
    assert any("outcomes differ" in p for p in found["problems"])


def test_another_training_of_the_same_spec_is_not_the_network(home):
    "Where a record does not say which weights they were, its networks are those of its trainings."
    shutil.rmtree(home / "runs")
    change(figure(home), lambda r: [e.pop("weights") for e in r["evaluations"]])
    (found,) = rerun.rerun(1, scale="smoke")
    assert found["compared"] and not found["problems"]
    for path in home.glob("figures/smoke/weights/*.json"):
        change(path, lambda r: r["provenance"].update(finished="2020-01-01T00:00:00Z"))
    (found,) = rerun.rerun(1, scale="smoke")
    assert not found["compared"] and not found["problems"] and "its network is neither" in found["said"]


@pytest.mark.parametrize("where", ["attack", "training"])
def test_a_changed_seed_is_found(home, where, capsys):
    def edit(r):
        (r["attack"] if where == "attack" else r["training"]["nsq"]["spec"]).update(seed=5)

    change(figure(home), edit)
    status, said = red(capsys)
    assert status == 1 and "spec or seed is not the one it was run with" in said


def test_random_starts_follow_the_places_of_the_images(home, monkeypatch):
    places, attack = set(), evaluation.pgd

    def spied(*given):
        places.add(tuple(given[-1].tolist()))
        return attack(*given)

    monkeypatch.setattr(evaluation, "pgd", spied)
    change(figure(home), lambda r: [e.update(batch_size=8) for e in r["evaluations"]])
    rerun.rerun(ALL, scale="smoke")
    assert places == {tuple(range(8)), tuple(range(8, 16)), tuple(range(16, 20))}


def test_what_cannot_be_known_is_said_in_a_line(home, capsys, monkeypatch):
    shutil.rmtree(home / "runs")
    (home / "figures/smoke/weights/mnist-nsq.json").unlink()
    (home / "figures/smoke/weights/mnist-nsq.safetensors").unlink()
    status, said = red(capsys)
    assert status == 0 and "6 curves not: its network" in said and "neither under runs/ nor beside the figures" in said
    shutil.rmtree(home / "figures/smoke/weights")
    status, said = red(capsys)
    assert status == 0 and "-         figures/smoke/fig3.json  (nothing computed again: " in said


def test_missing_and_other_data_and_devices_are_said(home, monkeypatch):
    def missing(*a):
        raise FileNotFoundError("no data")

    monkeypatch.setattr(rerun, "load", missing)
    (found,) = rerun.rerun(5, scale="smoke")
    assert "digits" in found["said"] and "not here" in found["said"] and not found["problems"]
    monkeypatch.setattr(rerun, "load", lambda *a: load("digits", "train"))
    (found,) = rerun.rerun(5, scale="smoke")
    assert "other images" in found["said"] and not found["problems"]
    change(figure(home), lambda r: [e["provenance"].update(device="NVIDIA H200") for e in r["evaluations"]])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (found,) = rerun.rerun(5, scale="smoke")
    assert "NVIDIA H200" in found["said"] and not found["compared"]
    change(figure(home), lambda r: r.pop("evaluations"))
    (found,) = rerun.rerun(5, scale="smoke")
    assert "does not list" in found["said"]


@pytest.mark.parametrize("wrong", [("--rerun", "0"), ("--rerun", "-3"), ("--rerun", "2", "--seed", "-1")])
def test_wrong_numbers_stop_before_any_work(home, wrong, capsys):
    assert cli.main(["verify", "--scale", "smoke", *wrong]) == 1
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and "allowed" in err
