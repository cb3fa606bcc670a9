"""The real FDSN client of ObsPy against a small station service on this machine."""

import io
import logging
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import numpy as np
import obspy
import pandas as pd
import pytest
from obspy import UTCDateTime
from obspy.clients.fdsn import Client

from gp2vec.cli import main
from gp2vec.data.archive import MANIFEST_COLUMNS, as_manifest, write_manifest
from gp2vec.data.metadata import MOTION_UNITS, StationMetadataManager, StationService, response_curve

NAMES = ("network", "station", "location", "channel")
COLUMNS = (*NAMES, "starttime", "endtime")
BOX = ("minlatitude", "maxlatitude", "minlongitude", "maxlongitude")
PARAMETERS = (*NAMES, *BOX, "starttime", "endtime", "level", "format", "nodata")
WADL = """<?xml version="1.0"?><application xmlns="http://wadl.dev.java.net/2009/02"
xmlns:xs="http://www.w3.org/2001/XMLSchema"><resources base="/fdsnws/station/1"><resource path="query">
<method name="GET" id="query"><request>{}</request></method></resource></resources></application>"""
DATA = Path(os.environ.get("GP2VEC_DATA") or "no data")
OBSPY = Path(obspy.__file__).parent


class Handler(BaseHTTPRequestHandler):
    "fdsnws-station, GET and POST, StationXML only; refuses responses of more than `limit` stations as too large."

    inventory, limit, nothing, asked, faults = obspy.read_inventory(), 9, 204, [], []

    def do_GET(self):
        url = urlparse(self.path)
        if url.path.endswith("/station/1/application.wadl"):
            times = {"starttime": "xs:dateTime", "endtime": "xs:dateTime"}
            names = (f'<param name="{n}" style="query" type="{times.get(n, "xs:string")}"/>' for n in PARAMETERS)
            self.answer(200, WADL.format("".join(names)).encode())
        elif url.path.endswith("/station/1/query"):
            asked = {name: values[0] for name, values in parse_qs(url.query).items()}
            self.query("GET", asked.pop("level"), [asked])
        else:
            self.answer(404)

    def do_POST(self):
        lines = self.rfile.read(int(self.headers["Content-Length"])).decode().splitlines()
        settings = dict(line.split("=") for line in lines if "=" in line)
        rows = [line.split() for line in lines if "=" not in line]
        self.query("POST", settings["level"], [dict(zip(COLUMNS, row, strict=True)) for row in rows])

    def query(self, method, level, rows):
        self.asked.append((method, level, rows))
        if self.faults:
            return self.answer(*self.faults.pop(0))
        found = obspy.Inventory()
        for row in rows:
            times = {name: UTCDateTime(row[name]) for name in ("starttime", "endtime") if name in row}
            location = row.get("location", "*").replace("--", "")
            for network in row.get("network", "*").split(","):
                for station in row.get("station", "*").split(","):
                    for channel in row.get("channel", "*").split(","):
                        found += self.inventory.select(network, station, location, channel, **times)
        stations = {(n.code, s.code) for n in found for s in n}
        if not stations:
            return self.answer(self.nothing)
        if level == "response" and len(stations) > self.limit:
            return self.answer(413)
        body = io.BytesIO()
        found.write(body, format="STATIONXML", level=level)
        self.answer(200, body.getvalue())

    def answer(self, code, body=b"", length=None):
        self.send_response(code)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def service():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
    Handler.asked.clear()
    Handler.faults.clear()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def manifest():
    "One channel of each of two stations named, and a station-day that names none; one station that nobody knows."
    rows = [("BW", "RJOB", "", "EHZ"), ("GR", "FUR", "", "BHZ"), ("GR", "WET", None, None), ("ZZ", "NONE", "", "HHZ")]
    day = {"starttime": UTCDateTime(2009, 8, 24).ns, "endtime": UTCDateTime(2009, 8, 25).ns, "byte_size": 1}
    return as_manifest([dict.fromkeys(MANIFEST_COLUMNS) | dict(zip(NAMES, row, strict=True)) | day for row in rows])


def names(manager) -> set[str]:
    return set(manager.table["network"] + "." + manager.table["station"])


@pytest.mark.parametrize("kind", ["url", "client"])
def test_roundtrip(service, kind):
    "What comes over the wire is what the inventory says, from a URL or from a client of the user's own."
    client = service if kind == "url" else Client(service)
    ours = StationMetadataManager.from_fdsn(client).table
    theirs = StationMetadataManager.from_inventory(Handler.inventory).table
    columns = [name for name in theirs if not name.startswith("response_") or name == "response_flag"]
    assert ours[columns].equals(theirs[columns]) and set(ours["response_flag"]) == {"ok"}
    for mine, yours in zip(ours["response_amplitude"], theirs["response_amplitude"], strict=True):
        assert mine == pytest.approx(yours, rel=1e-5, nan_ok=True)


def test_selection(service):
    found = StationMetadataManager.from_fdsn(
        service,
        networks=["BW", "GR"],
        stations="RJOB,FUR",
        channels=["EH?", "BHZ"],
        start="2009-08-24",
        end="2009-08-25",
    )
    assert names(found) == {"BW.RJOB", "GR.FUR"} and set(found.table["channel"]) == {"EHZ", "EHN", "EHE", "BHZ"}
    ((method, level, (asked,)),) = Handler.asked
    assert (method, level, asked["network"], asked["channel"]) == ("GET", "response", "BW,GR", "EH?,BHZ")
    row = found.lookup("BW", "RJOB", "", "EHZ", "2009-08-24T00:20:03")
    assert row["gain"] == pytest.approx(2.5168e9) and row["input_units"] == "M/S"


def test_bulk(service, manifest):
    "A manifest is one POST of its channels and times; what is unknown is named."
    found = StationMetadataManager.from_fdsn(service, manifest=manifest)
    ((method, level, rows),) = Handler.asked
    assert (method, level, len(rows)) == ("POST", "response", 4)
    day = ["2009-08-24T00:00:00.000000", "2009-08-25T00:00:00.000000"]
    assert [rows[0][name] for name in COLUMNS] == ["BW", "RJOB", "--", "EHZ", *day]
    assert [rows[2][name] for name in NAMES] == ["GR", "WET", "*", "*"]
    assert names(found) == {"BW.RJOB", "GR.FUR", "GR.WET"} and found.missing == ["ZZ.NONE"]
    channels = found.table.groupby("station")["channel"].agg(lambda codes: "".join(sorted(codes)))
    assert channels["RJOB"] == "EHZ" and channels["FUR"] == "BHZ" and len(channels["WET"]) > 9
    assert len(found.table[found.table.station == "RJOB"]) == 1  # the epoch of that day alone
    with pytest.raises(ValueError, match="a manifest or codes"):
        StationMetadataManager.from_fdsn(service, "GR", manifest=manifest)


@pytest.mark.parametrize("code", [204, 404])
def test_no_data(service, caplog, monkeypatch, manifest, code):
    monkeypatch.setattr(Handler, "nothing", code)
    with caplog.at_level(logging.WARNING):
        assert len(StationMetadataManager.from_fdsn(service, networks="ZZ")) == 0
        unknown = StationMetadataManager.from_fdsn(service, manifest=manifest.assign(network="ZZ"))
    assert "nothing for" in caplog.text and len(Handler.asked) == 2
    assert len(unknown) == 0 and unknown.missing == ["ZZ.FUR", "ZZ.NONE", "ZZ.RJOB", "ZZ.WET"]


def test_too_large(service, monkeypatch, manifest):
    "A request that the service refuses as too large is made in halves, down to the stations, with the same result."
    whole, bulk = (
        StationMetadataManager.from_fdsn(service),
        StationMetadataManager.from_fdsn(service, manifest=manifest),
    )
    monkeypatch.setattr(Handler, "limit", 1)
    parts = StationMetadataManager.from_fdsn(service)
    assert names(parts) == names(whole) == {"BW.RJOB", "GR.FUR", "GR.WET"} and len(parts) == len(whole)
    assert [rows[0]["station"] for _, _, rows in Handler.asked[-4:]] == ["RJOB", "FUR", "FUR", "WET"]
    Handler.asked.clear()
    assert StationMetadataManager.from_fdsn(service, manifest=manifest).table.map(str).equals(bulk.table.map(str))
    assert [len(rows) for _, _, rows in Handler.asked] == [4, 2, 1, 1, 2]
    monkeypatch.setattr(Handler, "limit", 0)
    with pytest.raises(OSError, match="GR WET .* too large: ask for fewer channels"):
        StationMetadataManager.from_fdsn(service, "GR", "WET")


@pytest.mark.parametrize(
    "faults", [[(503,), (500,)], [(429,)], [(200, b"<FDSNStationXML>")], [(200, b"", 0)], [(200, b"<FDSN", 999)]]
)
def test_patience(service, faults, manifest):
    "An answer that is busy, empty or cut off is asked for again."
    Handler.faults[:] = faults
    patient = StationService(service, wait=0.01)
    assert names(StationMetadataManager.from_fdsn(patient, manifest=manifest)) == {"BW.RJOB", "GR.FUR", "GR.WET"}
    assert len(Handler.asked) == len(faults) + 1


def test_failures_are_one_sentence(service):
    for client, fault, times, words in [
        (service, (503,), 3, "temporarily unavailable.*asked 3 times.*try later"),
        (service, (400,), 1, "Bad request.*asked 1 times"),
        ("http://127.0.0.1:19", (503,), 0, "No FDSN services could be discovered.*asked 3 times"),
    ]:
        Handler.faults[:] = [fault] * 9
        Handler.asked.clear()
        with pytest.raises(OSError, match=f"(?s)^expected stations from {client}, got '.*{words}") as caught:
            StationMetadataManager.from_fdsn(StationService(client, attempts=3, wait=0.01))
        assert len(Handler.asked) == times and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="NOWHERE"):
        StationMetadataManager.from_fdsn("NOWHERE")


def test_cache(service, manifest, tmp_path, monkeypatch):
    "The same question is not asked twice, not even the one that was too large, until it is refreshed."
    monkeypatch.setattr(Handler, "limit", 2)

    def ask(refresh=False, **what):
        Handler.asked.clear()
        found = StationMetadataManager.from_fdsn(StationService(service, tmp_path, refresh), **what)
        return found.table.map(str), len(Handler.asked)

    for what in ({"manifest": manifest}, {"networks": "*"}):
        first, asked = ask(**what)
        again, none = ask(**what)
        assert asked >= 3 and none == 0 and again.equals(first)
        assert ask(True, **what)[1] == asked
    assert ask(networks="GR")[1] == 1 and ask(networks="ZZ")[1] == 1 == ask(networks="ZZ")[1]  # nothing may change
    kept = list(tmp_path.rglob("*.xml"))
    assert all(len(obspy.read_inventory(str(path))) for path in kept if path.stat().st_size)
    assert len(kept) == len(list(tmp_path.rglob("*"))) and not any(p.name.startswith(".") for p in kept)


def test_command(service, manifest, tmp_path, capsys, monkeypatch):
    write_manifest(manifest, tmp_path / "m.parquet")
    cache = f"--cache {tmp_path}/cache"
    command = f"metadata --client {service} --output {tmp_path}/s.parquet --extract-features {cache}"
    assert main(command.split()) == 0
    assert len(StationMetadataManager.read(tmp_path / "s.parquet")) == 30 and Handler.asked[0][0] == "GET"
    command += f" --manifest {tmp_path}/m.parquet"
    assert [main(line.split()) for line in (command, command, f"{command} --refresh")] == [0, 0, 0]
    assert [method for method, _, _ in Handler.asked[1:]] == ["POST", "POST"]
    saved = StationMetadataManager.read(tmp_path / "s.parquet")
    assert set(saved.statistics) >= {"gain", "response"} and len(saved.statistics["response"]["scale"]) == 32
    assert saved.response("BW", "RJOB", "", "EHZ", "2009-08-24T12:00:00", np.array([1.0, 10.0])) is not None
    assert main([*command.split(), "--networks", "GR"]) == 2 and "a manifest or codes" in capsys.readouterr().err
    monkeypatch.setattr("gp2vec.data.metadata.time.sleep", lambda seconds: None)
    assert main(f"metadata --client http://127.0.0.1:19 --output {tmp_path}/n.parquet".split()) == 2


def same_responses(path: Path, folder: Path) -> dict[str, int]:
    "Save and load the table of a StationXML file; every believed response is ObsPy's to the last bit. Flags, counted."
    inventory = obspy.read_inventory(str(path))
    StationMetadataManager.from_inventory(inventory).write(folder / "s.parquet")
    manager = StationMetadataManager.read(folder / "s.parquet")
    flags = manager.table["response_flag"].value_counts().to_dict()
    for network in inventory:
        for station in network:
            for channel in station:
                time = channel.start_date or station.start_date
                codes = network.code, station.code, channel.location_code, channel.code
                if time is None or (row := manager.lookup(*codes, time)) is None:
                    continue
                frequencies = np.geomspace(1e-3, channel.sample_rate / 2, 50) if channel.sample_rate else np.ones(1)
                ours = manager.response(*codes, time, frequencies)
                assert (ours is not None) == (row["response_flag"] == "ok")
                if ours is not None and row["starttime"] == time.ns and response_curve(channel).flag == "ok":
                    output = MOTION_UNITS[row["input_units"]]
                    theirs = channel.response.get_evalresp_response_for_frequencies(frequencies, output)
                    assert np.array_equal(ours, theirs), codes
    return flags


@pytest.mark.parametrize(
    "name, flags",
    [
        ("core/tests/data/AU.MEEK.xml", {"ok": 1}),
        ("core/tests/data/G_CAN__LHZ.xml", {"ok": 1}),
        ("core/tests/data/IM_IL31__BHZ.xml", {"ok": 1}),  # counts per metre
        ("core/tests/data/IU_ANMO_BH.xml", {"ok": 8, "sensitivity": 1}),  # one states 10 % more than its stages give
        ("core/tests/data/IU_ULN_00_LH1.xml", {"ok": 1}),
        ("core/tests/data/DK.BSD..BHZ.xml", {"sensitivity": 1}),
        ("core/tests/data/TM.SKLT.__.BHZ_faulty_response.xml", {"error": 1}),
        ("core/tests/data/SL_BOJS_LHZ.xml", {"units": 1}),  # nanometres
        ("core/tests/data/hydrophone_response_PA.xml", {"units": 1}),
        ("core/tests/data/response_radian_per_second.xml", {"units": 1}),
        ("core/tests/data/polynomial_response.xml", {"polynomial": 1}),
        ("core/tests/data/stationxml_no_units_in_stage_1.xml", {"ok": 1}),
        ("io/stationxml/tests/data/IRIS_single_channel_with_response.xml", {"ok": 1}),
        ("io/stationxml/tests/data/only_soh.xml", {"empty": 1, "units": 1}),
    ],
)
def test_stations_of_obspy(name, flags, tmp_path):
    if not (OBSPY / name).exists():
        pytest.skip(f"this ObsPy comes without {name}")
    assert same_responses(OBSPY / name, tmp_path) == flags


def test_stations_of_many_vendors(tmp_path):
    "Real descriptions of twenty networks: what is believed is exact, what is not has its reason."
    files = sorted(DATA.glob("stationxml/*.xml"))
    if not files:
        pytest.skip("no real StationXML: GP2VEC_DATA names a folder with stationxml/*.xml")
    flags = pd.DataFrame({path.stem: same_responses(path, tmp_path) for path in files}).fillna(0).sum(axis=1)
    assert flags.to_dict() == {"ok": 234, "empty": 78, "units": 10}
