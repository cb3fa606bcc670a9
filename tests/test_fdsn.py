"""The real FDSN client of ObsPy against a small station service on this machine."""

import io
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlparse

import obspy
import pytest
from obspy import UTCDateTime
from obspy.clients.fdsn import Client

from gp2vec.data.metadata import StationMetadataManager

NAMES = ("network", "station", "location", "channel")
BOX = ("minlatitude", "maxlatitude", "minlongitude", "maxlongitude")
PARAMETERS = (*NAMES, *BOX, "starttime", "endtime", "level", "format", "nodata")
WADL = """<?xml version="1.0"?><application xmlns="http://wadl.dev.java.net/2009/02"
xmlns:xs="http://www.w3.org/2001/XMLSchema"><resources base="/fdsnws/station/1"><resource path="query">
<method name="GET" id="query"><request>{}</request></method></resource></resources></application>"""


class StationService(BaseHTTPRequestHandler):
    "fdsnws-station: GET only, StationXML only; refuses responses of more than `limit` stations as too large."

    inventory, limit, asked = obspy.read_inventory(), 9, []

    def do_GET(self):
        url = urlparse(self.path)
        if url.path.endswith("/station/1/application.wadl"):
            times = {"starttime": "xs:dateTime", "endtime": "xs:dateTime"}
            names = (f'<param name="{n}" style="query" type="{times.get(n, "xs:string")}"/>' for n in PARAMETERS)
            self.answer(200, WADL.format("".join(names)).encode())
        elif url.path.endswith("/station/1/query"):
            self.query({name: values[0] for name, values in parse_qs(url.query).items()})
        else:
            self.answer(404)

    def query(self, asked):
        self.asked.append(asked)
        times = {name: UTCDateTime(asked[name]) for name in ("starttime", "endtime") if name in asked}
        found = obspy.Inventory()
        for network in asked.get("network", "*").split(","):
            for station in asked.get("station", "*").split(","):
                for channel in asked.get("channel", "*").split(","):
                    found += self.inventory.select(network, station, channel=channel, **times)
        stations = {(n.code, s.code) for n in found for s in n}
        if not stations:
            return self.answer(int(asked.get("nodata", 204)))
        if asked["level"] == "response" and len(stations) > self.limit:
            return self.answer(413)
        body = io.BytesIO()
        found.write(body, format="STATIONXML", level=asked["level"])
        self.answer(200, body.getvalue())

    def answer(self, code, body=b""):
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def service():
    server = ThreadingHTTPServer(("127.0.0.1", 0), StationService)
    threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
    StationService.asked.clear()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def names(manager) -> set[str]:
    return set(manager.table["network"] + "." + manager.table["station"])


@pytest.mark.parametrize("kind", ["url", "client"])
def test_roundtrip(service, kind):
    "What comes over the wire is what the inventory says, from a URL or from a client of the user's own."
    client = service if kind == "url" else Client(service)
    ours = StationMetadataManager.from_fdsn(client).table
    theirs = StationMetadataManager.from_inventory(StationService.inventory).table
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
    (asked,) = StationService.asked
    assert (asked["network"], asked["channel"], asked["level"]) == ("BW,GR", "EH?,BHZ", "response")
    row = found.lookup("BW", "RJOB", "", "EHZ", "2009-08-24T00:20:03")
    assert row["gain"] == pytest.approx(2.5168e9) and row["input_units"] == "M/S"


def test_no_data(service, caplog):
    with caplog.at_level(logging.WARNING):
        assert len(StationMetadataManager.from_fdsn(service, networks="ZZ")) == 0
    assert "nothing for" in caplog.text


def test_too_large(service, monkeypatch):
    "A request that the service refuses as too large is made station by station, with the same result."
    whole = StationMetadataManager.from_fdsn(service)
    monkeypatch.setattr(StationService, "limit", 1)
    parts = StationMetadataManager.from_fdsn(service)
    assert names(parts) == names(whole) == {"BW.RJOB", "GR.FUR", "GR.WET"} and len(parts) == len(whole)
    assert [asked["station"] for asked in StationService.asked[-3:]] == ["RJOB", "FUR", "WET"]
