"""The charts as files."""

import xml.etree.ElementTree as xml
import zlib

from eval.report import write_report
from eval.report.gather import gather
from eval.report.plots import plots_of


def test_every_chart_is_written_as_a_picture_of_its_own(make_evaluation):
    folder = make_evaluation(n=20)
    write_report([folder])
    plots = plots_of(gather([folder]))
    assert len(plots) == 6 + 4  # rows of the table, curves of training
    for plot in plots:
        picture = xml.parse(folder / "plots" / f"{plot.name}.svg").getroot()
        assert picture.tag == "{http://www.w3.org/2000/svg}svg"
        texts = [text for element in picture.iter() if (text := element.text)]
        assert plot.title in texts
    (sort,) = [plot for plot in plots if plot.title == "sort"]
    text = (folder / "plots" / f"{sort.name}.svg").read_text()
    assert text.count("<rect class=") == 3 and text.count('class="error"') == 3


def test_png_files_have_the_pictures_size(make_evaluation):
    folder = make_evaluation(n=20, tasks=("sort",))
    write_report([folder])
    plot = plots_of(gather([folder]))[0]
    data = (folder / "plots" / f"{plot.name}.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(data[at : at + 4]) for at in (16, 20))
    assert (width, height) == (round(plot.width * 3), round(plot.height * 3))
    size = int.from_bytes(data[33:37])
    assert data[37:41] == b"IDAT" and zlib.decompressobj().decompress(data[41 : 41 + size])


def test_pictures_of_an_earlier_report_go(make_evaluation):
    folder = make_evaluation(n=20, tasks=("sort",))
    (folder / "plots").mkdir()
    (folder / "plots" / "09_old.svg").write_text("old")
    (folder / "plots" / "mine.svg").write_text("kept")
    write_report([folder])
    names = {path.name for path in (folder / "plots").iterdir()}
    assert "09_old.svg" not in names and {"mine.svg", "00_sort.svg", "00_sort.png"} <= names
