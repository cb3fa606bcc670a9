"""From the station table to the model: rows, words and response curves, kept, missing, saved and loaded."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import obspy
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, default_collate

from gp2vec.data import metadata as station_metadata
from gp2vec.data.archive import build_manifest, write_archive
from gp2vec.data.datapipes import METADATA_KEYS, WORD_KEYS, SeismicDataPipeline
from gp2vec.data.embedded import real_inventory, real_recordings
from gp2vec.data.metadata import StationMetadataManager, StationTable, station_table
from gp2vec.inference import embed
from gp2vec.models.conditioning import (
    FIELDS,
    RESPONSE_FREQUENCIES,
    WORDS,
    ConditioningConfig,
    StationEncoder,
    encode_fields,
    encode_response,
    metadata_from_rows,
    vocabularies,
)
from gp2vec.models.encoder import ConvLayer, EncoderConfig
from gp2vec.models.gp2vec import GP2Vec, GP2VecConfig, TasksConfig
from gp2vec.models.quantizer import QuantizerConfig
from gp2vec.models.transformer import ContextConfig

EVERYTHING = tuple(name for group in FIELDS for name in group)
FUSIONS = ("add", "film", "cross_attention")


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    "Seismometers, geophones and accelerometers of four stations, from StationXML that ObsPy ships."
    folder = Path(obspy.__file__).parent / "core/tests/data"
    more = obspy.read_inventory(folder / "Modified_IRIS_response_level_station.xml")
    return station_table(obspy.read_inventory() + more)


def everything(table, fusion="add", **changes) -> ConditioningConfig:
    return ConditioningConfig(
        **{"fields": EVERYTHING, "fusion": fusion, "response": True, **vocabularies(table, stations=True), **changes}
    )


def encoder_of(config: ConditioningConfig) -> StationEncoder:
    torch.manual_seed(0)
    encoder = StationEncoder(24, config).eval()
    torch.nn.init.normal_(encoder.unknown)
    return encoder


def model_of(config: ConditioningConfig, objective: str = "contrastive") -> GP2Vec:
    torch.manual_seed(0)
    return GP2Vec(
        GP2VecConfig(
            embed_dim=24,
            objective=objective,
            feature_encoder=EncoderConfig(conv_layers=(ConvLayer(16, 11, 4), ConvLayer(16, 5, 2))),
            quantizer=QuantizerConfig(codebook_size=8, codevector_dim=8),
            context_encoder=ContextConfig(num_layers=2, num_heads=2, conv_pos=8, conv_pos_groups=2, dropout=0.0),
            conditioning=config,
        )
    )


# From the table


def test_the_table_s_frequencies():
    assert np.allclose(RESPONSE_FREQUENCIES, station_metadata.RESPONSE_FREQUENCIES, rtol=1e-12)


def test_rows_in_every_form_say_the_same(table, tmp_path):
    "A data frame, one that went through a file, its rows as series or dictionaries, the manager's lookup."
    path = str(tmp_path / "stations.parquet")
    StationTable(table).write(path)
    rows = table.to_dict("records")
    row = rows[0]
    found = StationTable(table).lookup(
        *(row[k] for k in ("network", "station", "location", "channel")), row["starttime"]
    )
    forms = [StationTable.read(path).table, rows, [r for _, r in table.iterrows()], (r for r in rows)]
    expected, encoder = metadata_from_rows(table), encoder_of(everything(table))
    truth = encoder(expected, len(table))
    for form in forms:
        assert torch.equal(encoder(metadata_from_rows(form), len(table)), truth)
    for form in (found, row, table.iloc[0]):
        one = metadata_from_rows(form)
        assert all(len(value) == 1 for value in one.values())
        assert torch.allclose(encoder(one, 1), truth[:1], atol=1e-6)
    assert set(expected) == {*EVERYTHING, *WORDS, "response_amplitude", "response_phase", "response_valid"}


def test_responses_are_those_of_velocity(table):
    "Against velocity an accelerometer's curve rises by a decade per decade and leads by a quarter turn."
    known = metadata_from_rows(table)
    units, valid = table["input_units"].to_numpy(), known["response_valid"]
    assert (units[valid.any(1).numpy()] == "M/S**2").any()
    omega = 2 * math.pi * RESPONSE_FREQUENCIES
    for i in range(len(table)):
        if not valid[i].any():
            continue
        amplitude = torch.tensor(table["response_amplitude"][i]).double()[valid[i]]
        phase = torch.tensor(table["response_phase"][i]).double()[valid[i]]
        turns = {"M": -1, "M/S": 0, "M/S**2": 1}[units[i]]
        told = torch.polar(*(known[name][i][valid[i]].double() for name in ("response_amplitude", "response_phase")))
        truth = torch.polar(amplitude, phase) * (1j * omega[valid[i]]) ** turns
        assert (told - truth).abs().max() < 1e-5 * truth.abs().max()


def test_directions_are_those_of_their_component(table):
    known = metadata_from_rows(table)
    part = table["channel"].str[-1].to_numpy()
    assert known["azimuth"].isfinite().numpy()[part == "N"].all() and known["dip"].isfinite().numpy()[part == "Z"].all()
    assert not known["azimuth"].isfinite().numpy()[part == "Z"].any()
    assert metadata_from_rows({"azimuth": 7.0, "dip": -90.0})["azimuth"].tolist() == [7.0], "a user's own dictionary"


def test_what_is_missing_in_a_row_is_unknown(table):
    row = table.to_dict("records")[0]
    encoder = encoder_of(everything(table))
    nothing = encoder(None, 1)
    for empty in (None, {}, {"latitude": None, "network": None, "sensor": pd.NA, "gain": math.nan, "elevation": pd.NA}):
        assert torch.equal(encoder(metadata_from_rows(empty), 1), nothing)
    with pytest.raises(ValueError, match="expected a row of the station table"):
        metadata_from_rows([])
    broken = row | {"input_units": ""}
    assert not metadata_from_rows(broken)["response_valid"].any(), "a response of unknown unit says nothing"


# Missing, withheld, spoilt


@pytest.mark.parametrize("fusion", FUSIONS)
def test_each_thing_may_be_missing_for_each_window(table, fusion):
    "And then what stands beside it in the batch is as it was."
    rows = [row for row in table.to_dict("records") if row["channel"][-1] == "N" and row["response_valid"].any()][:4]
    rows = [row | {"datalogger": "Q330", "dip": -90.0} for row in rows]
    config = everything(table, fusion, dataloggers=("Q330",))
    encoder = encoder_of(config)
    known = metadata_from_rows(rows) | {"log_scale": torch.randn(4), "dip": torch.full((4,), -90.0)}
    truth, nothing = encoder(known, 4), encoder(None, 1)[0]
    groups = [names[0] for names in FIELDS] + [*WORDS, "response_valid"]
    for name in groups:
        value = known[name]
        without = [*value[:2], None, value[3]] if name in WORDS else value.clone()
        if name not in WORDS:
            without[2] = False if name == "response_valid" else math.nan
        got = encoder({**known, name: without}, 4)
        assert torch.equal(got[[0, 1, 3]], truth[[0, 1, 3]]) and not torch.allclose(got[2], truth[2], atol=1e-4), name
        if fusion == "cross_attention":  # one token says *unknown*, the others are as they were
            token = groups.index(name)
            others = [i for i in range(len(groups)) if i != token]
            assert torch.equal(got[2, others], truth[2, others])
            assert torch.allclose(got[2, token], nothing[token], atol=1e-6)


def test_spoilt_values_are_unknown_and_nothing_spreads(table):
    encoder = encoder_of(everything(table))
    known = metadata_from_rows(table) | {"log_scale": torch.zeros(len(table))}
    spoilt = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in known.items()}
    for name in EVERYTHING:
        spoilt[name][3] = math.inf
    spoilt["response_amplitude"][3] = math.nan
    got, truth = encoder(spoilt, len(table)), encoder(known, len(table))
    assert got.isfinite().all() and torch.equal(got[:3], truth[:3]) and torch.equal(got[4:], truth[4:])
    curves, there = encode_response(spoilt, len(table))
    assert not there[3] and curves[3].eq(0).all()


@pytest.mark.parametrize("fusion", FUSIONS)
def test_withheld_is_unknown_as_often_as_the_setting_says(table, fusion):
    row = next(r for r in table.to_dict("records") if r["channel"][-1] == "N" and r["response_valid"].any())
    count = 3000
    known = metadata_from_rows([row | {"datalogger": "Q330"}] * count)
    known |= {"log_scale": torch.zeros(count), "dip": torch.zeros(count)}
    encoder = encoder_of(everything(table, "cross_attention", dataloggers=("Q330",), dropout=0.3))
    truth, nothing = encoder(known, count)[0], encoder(None, 1)[0]
    got = encoder.train()(known, count)
    withheld = torch.isclose(got, nothing, atol=1e-5).all(-1)
    assert ((withheld.float().mean(0) - 0.3).abs() < 0.04).all()
    assert torch.allclose(got, torch.where(withheld[..., None], nothing, truth), atol=1e-5), "all or nothing"
    together = withheld.float().T.corrcoef() - torch.eye(withheld.shape[1])
    assert together.abs().max() < 0.1, "each for itself"
    always = encoder_of(everything(table, fusion, dropout=1.0))
    assert torch.allclose(
        always.train()(known, count), always.eval()(None, 1).expand(count, *always(None, 1).shape[1:]), atol=1e-5
    )


def test_words_unknown_to_the_vocabulary_are_unknown(table):
    encoder = encoder_of(everything(table, networks=("GR", "NO")))
    known = {"network": ["gr", " GR", "XX", "", "no"]}
    got, nothing = encoder(known, 5), encoder(None, 1)[0]
    assert torch.allclose(got[0], got[1], atol=1e-6) and not torch.allclose(got[0], got[4], atol=1e-3)
    assert torch.allclose(got[2:4], nothing.expand(2, -1), atol=1e-6)


def test_station_identity_is_off_unless_asked(table):
    assert "stations" not in vocabularies(table)
    config = ConditioningConfig(**vocabularies(table))
    one, other = ({"station": [name]} for name in ("GR.FUR", "GR.WET"))
    assert torch.equal(encoder_of(config)(one, 1), encoder_of(config)(other, 1))
    known = everything(table)
    assert not torch.equal(encoder_of(known)(one, 1), encoder_of(known)(other, 1))


# The model


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_saved_model_knows_the_same_words(table, tmp_path, fusion):
    "The vocabularies travel in the settings, as JSON."
    model = model_of(everything(table, fusion)).eval()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    again = GP2Vec.from_pretrained(tmp_path).eval()
    assert again.config == model.config
    assert "GR.FUR" in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    known, x = metadata_from_rows(table.iloc[:3]), torch.randn(3, 3, 500)
    with torch.no_grad():
        assert torch.equal(model.encode(x, known), again.encode(x, known))
        assert not torch.allclose(model.encode(x, known), model.encode(x), atol=1e-5)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_none_of_it_reaches_the_quantiser(table, fusion):
    "The targets have no gradient to the station, and the answers have."
    model = model_of(everything(table, fusion)).train()
    for parameter in model.context_encoder.parameters():  # a fusion that begins at zero would hide a leak
        parameter.data += 0.02 * torch.randn_like(parameter)
    seen = []
    model.quantizer.register_forward_hook(lambda module, args, out: seen.append((args, out)))
    known, x = metadata_from_rows(table.iloc[:3]), torch.randn(3, 3, 800)
    step = model(x, known, log_scale=torch.randn(3))
    (args, target), station = seen[0], list(model.station_encoder.parameters())
    sources = [
        target.vectors.sum(),
        target.diversity,
        *(a.sum() for a in args if torch.is_tensor(a) and a.requires_grad),
    ]
    assert len(sources) > 2
    for source in sources:
        assert all(g is None for g in torch.autograd.grad(source, station, retain_graph=True, allow_unused=True))
    assert any(g is not None and g.abs().sum() > 0 for g in torch.autograd.grad(step.loss, station, allow_unused=True))


def test_half_precision_model_takes_metadata(table):
    model = model_of(everything(table)).bfloat16().eval()
    with torch.no_grad():
        assert model.encode(torch.randn(2, 3, 500).bfloat16(), metadata_from_rows(table.iloc[:2])).isfinite().all()


def test_readme_dictionary_and_row_agree(table):
    row = table.to_dict("records")[0]
    names = ("latitude", "longitude", "elevation", "depth", "sampling_rate")
    by_hand = {name: torch.tensor([row[name]], dtype=torch.float32) for name in names}
    model = model_of(ConditioningConfig()).eval()
    x = torch.randn(1, 3, 500)
    with torch.no_grad():
        told = model.encode(x, by_hand)
        for form in (metadata_from_rows(row), row, table.iloc[0], table.iloc[:1]):
            assert torch.equal(model.encode(x, form), told)
        two = model.encode(x.expand(2, -1, -1), table.iloc[0])
        assert torch.allclose(two, told.expand(2, -1, -1), atol=1e-5), "a row is that of all windows"
        with pytest.raises(ValueError, match=r"\(2,\), not \(3,\)"):
            model.encode(x.expand(2, -1, -1), table.iloc[:3])
    features, there = encode_fields(by_hand, names, 1)
    assert there.all() and features.isfinite().all()


# From an archive to the model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Shards of the recordings and stations that ObsPy ships, and the station table."
    archive = write_archive(tmp_path_factory.mktemp("archive"), real_recordings(), real_inventory())
    manifest = build_manifest(archive)
    manager = StationMetadataManager.from_archive(archive, manifest)
    pipeline = SeismicDataPipeline(manifest, manager)
    return pipeline, pipeline.create_webdataset(1000, tmp_path_factory.mktemp("shards"), progress=False), manager


def knowing(manager, fusion="add") -> GP2Vec:
    words = vocabularies(manager.table)
    model = model_of(ConditioningConfig(fields=("elevation", "log_scale"), fusion=fusion, response=True, **words))
    return GP2Vec(
        replace(model.config, conditioning=replace(model.config.conditioning, bands=()), tasks=TasksConfig(band=0.1))
    )


def test_words_and_responses_come_from_the_shards(made):
    "What the station table knows reaches the model in training, the same from shards and straight from the archive."
    pipeline, dataset, manager = made
    batch = next(iter(DataLoader(dataset, batch_size=16, shuffle=False)))
    known = batch["metadata"]
    assert len(set(known["network"])) > 2 and all(name.count(".") == 1 for name in known["station"])
    assert {band[1] for band in known["band"]} <= set("HNLPG") and any(known["sensor"])
    streamed = {(s["id"], int(s["starttime"])): s["metadata"] for s in pipeline.stream(shuffle=False)}
    for i, key in enumerate(zip(batch["id"], batch["starttime"].tolist(), strict=True)):
        mine = {name: value[i] for name, value in known.items()}
        assert {k: v for k, v in mine.items() if isinstance(v, str)} == {k: streamed[key][k] for k in WORD_KEYS}
        for name in METADATA_KEYS:
            assert torch.allclose(mine[name], streamed[key][name], equal_nan=True), (key, name)
        alone = (default_collate([one]) for one in (mine, streamed[key]))
        features = [encode_response(one, 1)[0] for one in alone]
        assert torch.allclose(*features, atol=1e-4)
    model = knowing(manager).train()
    torch.manual_seed(1)
    step = model(batch["waveform"], known, batch["component_mask"], batch["log_scale"])
    assert step.tasks["band"] > 0
    step.loss.backward()
    station = model.station_encoder
    for part in (station.words["network"], station.words["sensor"], station.response, model.tasks["band"]):
        assert sum(float(p.grad.abs().sum()) for p in part.parameters()) > 0


def test_a_response_is_that_of_velocity_whatever_its_unit():
    size = len(RESPONSE_FREQUENCIES)
    omega = 2 * math.pi * RESPONSE_FREQUENCIES.float()
    flat = {"response_phase": torch.zeros(2, size), "response_valid": torch.ones(2, size, dtype=torch.bool)}
    given = flat | {"response_amplitude": torch.stack([omega, torch.ones(size)]), "input_units": ["M/S", "M/S**2"]}
    (seismometer, accelerometer), known = encode_response(given, 2)
    assert torch.allclose(seismometer[0], accelerometer[0], atol=1e-5) and known.all(), "both rise with frequency"
    assert torch.allclose(accelerometer[1], torch.ones(size)), "and an accelerometer leads by a quarter turn"
    assert not encode_response(given | {"input_units": ["", "PA"]}, 2)[1].any()


def test_embeddings_know_the_station(made):
    _, _, manager = made
    model = knowing(manager).eval()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    stream = real_recordings()
    blind, told = embed(model, stream), embed(model, stream, lookup=manager)
    assert not np.allclose(blind.vectors, told.vectors, atol=1e-4)
