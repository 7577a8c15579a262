"""The viewer in Chromium: it shows what render.py writes, at its place in the patient, and nothing leaves the machine.

Run by make test-browser."""

import http.client
import os
import shutil
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import nibabel
import numpy as np
import pytest
import uvicorn
from oblique_case import FRAMES, HEIGHT, LABELS, WIDTH, make_case, oblique, save_model

import render
from arguments import model_options
from patient.meshes import read_mesh
from utils.images import read_image
from viewer.case import Case
from viewer.report import write_report
from viewer.server import application

pytestmark = pytest.mark.browser
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist",
]  # fmt: skip
SOON = 60_000  # ms; pages wait for software WebGL on busy machines


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = make_case(tmp_path_factory.mktemp("browser"))
    return Case.open(model_options({"model_path": str(folder), "device": "cpu"}), say=lambda _: None)


@contextmanager
def served(case):
    """The address of a viewer running in this process."""
    config = uvicorn.Config(
        application(case, ["127.0.0.1"]), port=0, log_level="error", lifespan="off", access_log=False
    )
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.02)
    port = running.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    running.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def server(case):
    with served(case) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    program = shutil.which(os.environ.get("CHROMIUM", "chromium"))
    assert program, "no Chromium: apt-get install chromium, or name one with CHROMIUM=..."
    with sync_playwright() as tool:
        running = tool.chromium.launch(executable_path=program, args=FLAGS)
        yield running
        running.close()


@pytest.fixture(scope="module")
def asked():
    """Addresses of everything that pages requested."""
    return []


@pytest.fixture(scope="module")
def page(browser, server, asked):
    page = browser.new_page(viewport={"width": 1300, "height": 700})
    page.set_default_timeout(SOON)
    page.faults = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.goto(server)
    page.wait_for_selector("#waiting", state="hidden")
    assert page.evaluate("[medgs.state.level, medgs.state.width]") == [40, 400]  # soft tissue: these are HU
    page.select_option("#preset", "")
    yield page
    assert page.faults == []


def until(page, condition):
    """Waits for a condition; playwright's own way evaluates text in the page, which the page's policy forbids."""
    end = time.monotonic() + SOON / 1000
    while not page.evaluate(f"Boolean({condition})"):
        assert time.monotonic() < end, f"in vain: {condition}"
        time.sleep(0.05)


def show(page, t):
    """Moves the slider there, and waits for the slice."""
    page.evaluate(
        "t => { const bar = document.getElementById('t'); bar.value = t; bar.dispatchEvent(new Event('input')) }",
        t,
    )
    until(page, f"medgs.view.data?.header.t === {t}")
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def drawn(page):
    """The windowed slice as painted, (H, W) uint8."""
    data = page.evaluate(
        f"Array.from(medgs.view.buffers[0].getContext('2d').getImageData(0, 0, {WIDTH}, {HEIGHT}).data)"
    )
    return np.array(data, np.uint8).reshape(HEIGHT, WIDTH, 4)[:, :, 0]


@pytest.fixture(scope="module")
def rendered(case):
    """The folder after render.py --interp 4 --pipeline both --nifti."""
    with pytest.MonkeyPatch.context() as patch:
        line = ["render.py", "-m", case.options.model_path, "--interp", "4", "--pipeline", "both", "--nifti"]
        patch.setattr(sys, "argv", [*line, "--device", "cpu", "--quiet"])
        render.main()
    return case.options.model_path


def test_the_slider_shows_what_render_writes(page, rendered):
    page.select_option("#mask", "none")
    seen = []
    for t in (0.0, 2.25, 5.0, 6.75):
        show(page, t)
        picture = drawn(page)
        file = read_image(f"{rendered}/render_img/{int(t):05d}_{round(4 * (t % 1))}.png")
        # Levels are rounded from float32 there and from float64 here: a value half-way may go either way.
        assert np.abs(picture.astype(int) - file).max() <= 1 and (picture != file).mean() < 1e-3
        seen.append(page.evaluate("document.getElementById('picture').toDataURL()"))
    assert len(set(seen)) == 4


def test_window_and_level(page):
    show(page, 3.0)
    plain = page.evaluate("Array.from(medgs.view.data.image.data)")
    box = page.locator("#picture").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - 120, y + 40, steps=6)
    page.mouse.up()
    level, width = page.evaluate("[medgs.state.level, medgs.state.width]")
    assert width == pytest.approx(500 - 120 * 500 / 400, abs=10) and level == pytest.approx(
        50 + 40 * 500 / 400, abs=10
    )
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    values = np.array(plain).reshape(HEIGHT, WIDTH) * 500 - 200
    expected = ((values - (level - width / 2)) / width * 255).clip(0, 255)
    assert np.abs(drawn(page) - expected).max() <= 0.51
    page.select_option("#preset", "Liver")
    assert page.evaluate("[medgs.state.level, medgs.state.width]") == [60, 160]
    page.select_option("#preset", "")
    assert page.evaluate("[medgs.state.level, medgs.state.width]") == [50, 500]


def test_the_mask_is_outlined_and_filled_where_it_is(page, case):
    show(page, 4.5)
    _, masks = case.draw([4.5])
    inside = masks[0] >= 0.5
    assert 100 < inside.sum() < 1500
    count = """() => { const c = document.getElementById('picture'), p = c.getContext('2d');
      const d = p.getImageData(0, 0, c.width, c.height).data, f = medgs.view.frame(); let orange = 0;
      for (let i = 0; i < d.length; i += 4) if (d[i] > 150 && d[i + 2] < 90 && d[i] - d[i + 2] > 90) orange++;
      return orange / (f.scale * f.scale * medgs.view.aspect) }"""
    shares = {}
    for how in ("none", "outline", "fill"):
        page.select_option("#mask", how)
        page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        shares[how] = page.evaluate(count)  # in px of the slice
    assert shares["none"] == 0 and 5 < shares["outline"] < inside.sum() / 2
    assert shares["fill"] == pytest.approx(inside.sum(), rel=0.1)  # the crosshair covers some


def test_crosshair_mesh_and_volume_agree_in_millimetres(page, case, rendered):
    """On an oblique stack, the slice's crosshair, NiiVue's and the voxel written by render.py are at the same place."""
    image, mask = (nibabel.load(f"{rendered}/render_{what}.nii.gz") for what in ("img", "mask"))
    for u, v, t in ((11, 22, 2.25), (30, 9, 5.5)):
        show(page, t)
        page.evaluate("([u, v]) => { medgs.view.cross = [u, v]; medgs.moveTo(medgs.state.t) }", [u, v])
        page.wait_for_timeout(300)
        expected = oblique().to_patient(np.array([u, v, t]))
        assert np.allclose(page.evaluate("medgs.volume().place()"), expected, atol=0.02)  # NiiVue's float32
        assert np.allclose(page.evaluate("([u, v, t]) => medgs.toPatient(u, v, t)", [u, v, t]), expected)
        # NiiVue's value there is that of the voxel in the file.
        voxel = np.rint(np.linalg.inv(image.affine) @ [*expected, 1])[:3].astype(int)
        there = page.evaluate(
            "mm => { const v = medgs.volume().nv.volumes[0], x = v.mm2vox(mm); return v.getValue(...x) }",
            expected.tolist(),
        )
        assert there == pytest.approx(image.get_fdata()[tuple(voxel)], abs=0.02)
    # The other way round: setting the crosshair in the volume moves the slice.
    target = oblique().to_patient(np.array([20.0, 15.0, 3.75]))
    page.evaluate(
        """mm => { const nv = medgs.volume().nv;
          nv.scene.crosshairPos = nv.mm2frac(mm, 0, true); nv.createOnLocationChange() }""",
        target.tolist(),
    )
    until(page, "Math.abs(medgs.view.data.header.t - 3.75) < 0.01")
    assert page.evaluate("medgs.view.cross") == pytest.approx([20, 15], abs=0.05)
    # The mesh encloses the mask: same centre, same extent, to a voxel.
    points = np.array(
        page.evaluate("Array.from(medgs.volume().nv.meshes.find(mesh => mesh.name.endsWith('ply')).pts)")
    ).reshape(-1, 3)
    voxels = np.argwhere(np.asarray(mask.dataobj))
    inside = nibabel.affines.apply_affine(mask.affine, voxels)
    assert np.allclose(points.min(0), inside.min(0), atol=2.5) and np.allclose(
        points.max(0), inside.max(0), atol=2.5
    )


def test_the_slice_goes_through_the_mesh_in_3d(page):
    """The slice in 3-D lies where the frame lies, in the colours of its pixels; on the planes it is left out."""
    page.select_option("#mask", "none")
    for t in (2.25, 5.5):
        show(page, t)
        points = np.array(page.evaluate("Array.from(medgs.volume().nv.meshes[0].pts)")).reshape(
            HEIGHT, WIDTH, 3
        )
        for u, v in ((0, 0), (WIDTH - 1, 0), (0, HEIGHT - 1), (30, 9)):
            assert np.allclose(points[v, u], oblique().to_patient(np.array([u, v, t], float)), atol=1e-3)
        levels = np.array(page.evaluate("Array.from(medgs.volume().nv.meshes[0].rgba255)"))
        assert np.array_equal(levels.reshape(HEIGHT, WIDTH, 4)[:, :, 0], drawn(page))
    flat, solid = page.evaluate(
        """() => { const nv = medgs.volume().nv, seen = [];
          nv.setMeshThicknessOn2D(1); // as where a mesh was given
          for (const layout of ['axial', 'solid']) {
            document.querySelector(`[data-layout=${layout}]`).click(); nv.drawScene(); seen.push(nv.meshes[0].visible) }
          document.querySelector('[data-layout=planes]').click(); return seen }"""
    )
    assert not flat and solid
    page.select_option("#mask", "outline")


def test_ten_rapid_moves_leave_no_queue(page, case, server, monkeypatch):
    show(page, 1.0)
    plain = Case.drawn

    def slow(self, positions):
        time.sleep(0.15)
        return plain(self, positions)

    monkeypatch.setattr(Case, "drawn", slow)
    before = page.evaluate("fetch('/api/state').then(a => a.json())")
    start = time.monotonic()
    page.evaluate("() => { for (let k = 1; k <= 10; k++) { medgs.state.t = k * 0.5; medgs.ask() } }")
    until(page, "medgs.view.data.header.t === 5")
    page.wait_for_timeout(500)
    after = page.evaluate("fetch('/api/state').then(a => a.json())")
    # The first may have started, and the last is drawn; on a busy machine another one may come in between.
    assert 1 <= after["drawn"] - before["drawn"] <= 4
    assert time.monotonic() - start < 10
    assert page.evaluate("medgs.view.data.header.t") == 5


def test_comparisons_and_ellipses(page, case):
    show(page, 2.5)
    page.select_option("#against", "linear")
    until(page, "medgs.view.data.header.against?.kind === 'linear'")
    for how in ("wipe", "beside", "difference"):
        page.select_option("#how", how)
    frames = case.inputs.images([2, 3]).numpy()[:, 0]
    other = np.array(page.evaluate("Array.from(medgs.view.data.other.data)")).reshape(HEIGHT, WIDTH)
    assert np.allclose(other, frames.mean(0), atol=1e-6)
    page.check("#ellipses")
    until(page, "medgs.view.data.header.gaussians?.total === 400")
    # By head: every Gaussian here is more opaque in the masks, so none is drawn in the images' blue.
    colours = """() => { const c = document.getElementById('picture');
      const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; let orange = 0, green = 0;
      for (let i = 0; i < d.length; i += 4) {
        if (d[i] - d[i + 2] > 25) orange++;
        if (d[i + 1] - d[i] > 40 && d[i + 1] - d[i + 2] > 20) green++;
      } return [orange, green] }"""
    page.select_option("#mask", "none")
    seen = {}
    for what in ("opacity", "sigma", "head"):
        page.select_option("#colour", what)
        page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        seen[what] = page.evaluate(colours)
    assert seen["opacity"][1] > 100 and seen["head"][1] == 0 and seen["head"][0] > 100
    assert seen["sigma"] != seen["opacity"]
    page.select_option("#colour", "opacity")
    page.uncheck("#ellipses")
    page.select_option("#against", "")


def test_keys_and_the_link_restore_the_view(page, browser, server):
    show(page, 3.0)
    page.focus("#picture")
    page.keyboard.press("ArrowRight")
    until(page, "medgs.view.data.header.t === 3.125")
    page.keyboard.press("ArrowUp")  # to the slice that was held out
    until(page, "medgs.view.data.header.t === 3.5")
    page.keyboard.press("ArrowUp")
    until(page, "medgs.view.data.header.t === 4")
    page.keyboard.press("d")
    page.evaluate("() => { medgs.view.cross = [12.5, 7]; medgs.moveTo(4) }")
    page.wait_for_timeout(400)  # the address follows the state
    other = browser.new_page()
    other.set_default_timeout(SOON)
    other.goto(page.url)
    until(other, "window.medgs?.view.data?.header.t === 4")
    assert other.evaluate("document.documentElement.classList.contains('light')")
    assert other.evaluate("medgs.view.cross") == [12.5, 7]
    other.close()
    page.keyboard.press("d")
    with page.expect_download() as saved:
        page.keyboard.press("s")
    assert read_image(saved.value.path().rename(saved.value.path().with_suffix(".png"))).std() > 5


def test_a_running_training_is_followed(page, case):
    page.click("#follow")
    save_model(Path(case.options.model_path), 90, opacity=case.model.params["opacity"].detach() - 1)
    until(page, "document.getElementById('about').textContent.includes('iteration 90')")
    until(page, "medgs.view.data.header.iteration === 90")
    page.wait_for_selector("#waiting", state="hidden")
    page.click("#follow")


def test_nothing_is_asked_of_other_machines(page, asked, server):
    assert len(asked) > 20
    assert [url for url in asked if not url.startswith((server + "/", "data:", "blob:"))] == []


def test_only_the_served_folders_can_be_read(server):
    host = server.removeprefix("http://")
    for path in (
        "/page/../../view.py", "/page/..%2f..%2fview.py", "/shared/%2e%2e/%2e%2e/LICENSE", "/page//etc/passwd",
        "/api/volume/..%2f..%2fcfg_args", "/shared/../figures.py", "/page/%2fetc%2fpasswd",
    ):  # fmt: skip
        connection = http.client.HTTPConnection(host)
        connection.putrequest("GET", path)  # as it is: no normalisation by the client
        connection.endheaders()
        answer = connection.getresponse()
        assert answer.status in (400, 404), path
        assert b"import" not in answer.read()
    connection = http.client.HTTPConnection(host)
    connection.request("GET", "/api/about", headers={"Host": "elsewhere.example"})
    assert connection.getresponse().status == 400  # another site's name resolved to this machine
    for t in ("-1", str(FRAMES), "nan", "x"):
        connection = http.client.HTTPConnection(host)
        connection.request("GET", f"/api/view?t={t}")
        assert connection.getresponse().status == 400


def test_the_mesh_file_is_the_one_that_is_shown(case, tmp_path, server):
    connection = http.client.HTTPConnection(server.removeprefix("http://"))
    connection.request("GET", "/api/volume/mesh.ply")
    (tmp_path / "mesh.ply").write_bytes(connection.getresponse().read())
    mesh = read_mesh(tmp_path / "mesh.ply")
    assert mesh.metadata["space"] == "RAS" and mesh.metadata["unit"] == "mm" and mesh.volume > 0


def test_labels_are_named_coloured_and_switched_off(browser, tmp_path):
    """In the viewer: the labels' colours, the name under the cursor, the legend; the link keeps the choice."""
    folder = make_case(tmp_path, LABELS)
    case = Case.open(model_options({"model_path": str(folder), "device": "cpu"}), say=lambda _: None)
    with served(case) as address:
        page = browser.new_page(viewport={"width": 1100, "height": 700})
        page.set_default_timeout(SOON)
        page.goto(f"{address}/#t=4&mask=fill&opacity=1")
        page.wait_for_selector("#waiting", state="hidden")
        until(page, "medgs.view.data?.header.t === 4")
        _, masks = case.draw([4.0])
        seen = """() => { const c = document.getElementById('picture'), f = medgs.view.frame();
          const out = {blue: 0, orange: 0};
          const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
          for (let i = 0; i < d.length; i += 4) {
            if (d[i] === 86 && d[i + 1] === 180 && d[i + 2] === 233) out.blue++;
            if (d[i] === 230 && d[i + 1] === 159 && d[i + 2] === 0) out.orange++;
          }
          return [out.blue, out.orange].map(n => n / (f.scale * f.scale * medgs.view.aspect)) }"""
        shares = page.evaluate(seen)
        assert shares == pytest.approx([(masks == 2).sum(), (masks == 300).sum()], rel=0.25)
        row, column = np.argwhere(masks[0] == 300)[len(np.argwhere(masks[0] == 300)) // 2]
        x, y = page.evaluate(
            """([u, v]) => { const f = medgs.view.frame();
              const b = document.getElementById('picture').getBoundingClientRect();
              return [b.left + (f.left + (u + 0.5) * f.scale) / devicePixelRatio,
                      b.top + (f.top + (v + 0.5) * f.scale * medgs.view.aspect) / devicePixelRatio] }""",
            [int(column), int(row)],
        )
        page.mouse.move(x, y)
        assert "liver" in page.inner_text("#bottom-right")
        page.uncheck("#labels li:nth-child(2) input")
        page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        blue, orange = page.evaluate(seen)
        assert orange == 0 and blue == pytest.approx(shares[0], rel=0.1)
        meshes = "medgs.volume().nv.meshes.filter(m => m.name.endsWith('ply')).map(m => [m.name, m.visible])"
        assert page.evaluate(meshes) == [["2.ply", True], ["300.ply", False]]
        assert page.evaluate("[...new Set(medgs.volume().nv.volumes[1].img)].sort()") == [0, 2]
        page.check("#labels li:nth-child(2) input")
        assert page.evaluate("[...new Set(medgs.volume().nv.volumes[1].img)].sort()") == [0, 2, 300]
        page.uncheck("#labels li:nth-child(2) input")
        page.wait_for_timeout(300)
        assert "hidden=300" in page.url
        page.close()


def test_pages_of_one_file_open_without_a_server(browser, case, tmp_path):
    """From disk, with no request but the file: volume, mask and mesh are unpacked and placed."""
    write_report(case, tmp_path / "report.html")
    page, asked = browser.new_page(), []
    page.set_default_timeout(SOON)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"file://{tmp_path / 'report.html'}")
    page.wait_for_selector(".waiting", state="hidden")
    assert [url for url in asked if not url.startswith(("data:", "blob:"))] == [
        f"file://{tmp_path / 'report.html'}"
    ]
    expected = oblique().to_patient(np.array([10.0, 20.0, 4.0]))
    page.evaluate("mm => medgs.volume.goTo(mm)", expected.tolist())
    assert np.allclose(page.evaluate("medgs.volume.place()"), expected, atol=0.02)
    assert page.evaluate("[medgs.volume.nv.volumes.length, medgs.volume.nv.meshes.length]") == [2, 2]
    before = page.get_attribute("#slider img", "src")
    page.evaluate(
        """() => { const bar = document.querySelector('#slider input');
          bar.value = 0; bar.dispatchEvent(new Event('input')) }"""
    )
    assert page.get_attribute("#slider img", "src") != before
    page.emulate_media(media="print")
    assert page.is_visible("img.printed") and not page.is_visible(".solid")
    page.close()
