"""The TypeScript client as npm packs it: its types on Node, and npm's linters.

The tools are those of `tests/clients/npm/`, which `make test` installs into `.cache/npm`.
"""

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.files import ROOT
from tests.patience import PATIENCE_S
from tests.servers.javascript import CLIENT, DENO, NPM, deno_environment, needed, packed

LOCKED = ROOT / "tests/clients/npm"

#: A caller that uses each part of the client. The compiler must refuse the marked lines.
USES = """
import { Client, Face, familyOf, verifyCallback } from "@ourvidz/serverless";
import type { Callback, Family, Result, Status, Untyped } from "@ourvidz/serverless";

const client = new Client({ apiKey: "rpa-key", endpoints: { sdxl: "a", wan: ["b", "c"] }, fetch });
const picture = { type: "sdxl_image_fast", user_id: "u", prompt: "a red sun" } as const;
const job = await client.submit(picture, { bucketName: "own" });
const result: Result = await job.result(1000);
const family: Family = familyOf(picture);
const status: Status = "IN_QUEUE";
const seed: number | null | undefined = result.assets[0].metadata.seed;
for await (const piece of job.stream()) piece.toUpperCase();
const request = new Request("http://localhost/", { method: "POST" });
const document: Callback = await verifyCallback(request, "secret", { requireWebhook: false });
const reply: string | undefined = (await new Face({ url: "", apiKey: "" }).chat({})).response;
type Payload = Untyped<{ type: string }>;
export { document, family, type Payload, reply, seed, status };

// @ts-expect-error a prompt is a text
await client.submit({ type: "sdxl_image_fast", user_id: "u", prompt: 1 });
// @ts-expect-error no such job type
familyOf({ type: "poem" });
"""


def tool(name: str) -> list[str]:
    """A tool from npm, to be run by Node."""
    program = NPM / ".bin" / name
    needed(program.exists(), f"{name} is not in .cache/npm; `make test` installs it where npm is")
    return ["node", str(program.resolve())]


def run(command: Sequence[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        env=deno_environment(),
        timeout=PATIENCE_S,
    )


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which only the package is installed; the types of Node are elsewhere."""
    folder = tmp_path_factory.mktemp("application")
    home = folder / "node_modules/@ourvidz/serverless"
    home.parent.mkdir(parents=True)
    shutil.unpack_archive(packed(), folder)
    (folder / "package").rename(home)
    (folder / "package.json").write_text('{"type": "module"}')
    (folder / "uses.ts").write_text(USES)
    return folder


@pytest.mark.parametrize(
    ("resolution", "module"), [("nodenext", "nodenext"), ("bundler", "esnext")]
)
def test_the_package_has_its_types_on_node(application: Path, resolution: str, module: str) -> None:
    options = ["--moduleResolution", resolution, "--module", module, "--target", "es2022"]
    types = ["--lib", "es2023", "--typeRoots", str(NPM / "@types"), "--types", "node"]

    done = run([*tool("tsc"), "--strict", "--noEmit", *options, *types, "uses.ts"], application)

    assert (done.stdout, done.returncode) == ("", 0)


def test_every_kind_of_import_of_the_package_finds_its_types() -> None:
    # The package has only ECMAScript modules, which `require` accepts since Node 20.19.
    command = [*tool("attw"), str(packed()), "--ignore-rules", "cjs-resolves-to-esm"]

    done = run([*command, "--format", "json"], packed().parent)

    assert done.returncode == 0, done.stdout
    analysis = json.loads(done.stdout)["analysis"]
    assert analysis["types"]["kind"] == "included"
    assert {each["kind"] for each in analysis["problems"]} <= {"CJSResolvesToESM"}


def test_publint_finds_no_fault_in_the_package() -> None:
    done = run([*tool("publint"), str(packed()), "--strict"], packed().parent)

    assert done.returncode == 0, done.stdout
    assert "All good!" in done.stdout


@pytest.mark.parametrize(
    "runtime",
    [["node", "--input-type=module", "--eval"], [DENO, "eval", "--node-modules-dir=manual"]],
    ids=["node", "deno"],
)
def test_the_package_is_imported_by_its_name(application: Path, runtime: list[str | Path]) -> None:
    program = (
        'import { familyOf } from "@ourvidz/serverless";'
        'console.log(familyOf({ type: "video_fast" }));'
    )

    done = run([*runtime, program], application)

    assert (done.stdout, done.returncode) == ("wan\n", 0), done.stderr


def test_every_tool_is_locked_by_its_hash() -> None:
    wanted = json.loads((LOCKED / "package.json").read_text())["dependencies"]
    packages = json.loads((LOCKED / "package-lock.json").read_text())["packages"]

    assert packages.pop("")["dependencies"] == wanted
    package = json.loads((CLIENT / "package.json").read_text())
    assert package["devDependencies"]["typescript"] == wanted["typescript"]
    assert all(each["integrity"].startswith("sha512-") for each in packages.values())
    assert "npm ci --prefix .cache/npm --ignore-scripts" in (ROOT / "Makefile").read_text()
