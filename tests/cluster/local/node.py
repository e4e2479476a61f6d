"""One node of a real Kubernetes on this machine: API server, controllers, scheduler, kubelet, containerd, DNS.

All its files are in one folder, which also identifies it: processes with that folder in their command line are
stopped, and mounts below it are unmounted. So the next run can clean up after one that was killed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from genvalues.common.errors import UserError

from .binaries import CACHE, KUBERNETES_PROGRAMS, program

FOLDER = CACHE / "node"
KUBECONFIG = FOLDER / "kubeconfig"
SOCKET = FOLDER / "containerd.sock"
IMAGES = CACHE / "containerd"  # kept after the node: images stay loaded
INSTANCE_LABEL = "node.kubernetes.io/instance-type"
NODE, BRIDGE, NETWORK = "local", "llamalora0", "llama-lora-tests"
INSTANCE_TYPE = "ml.trn1.32xlarge"
HEALTH, HEALTHY = "sagemaker.amazonaws.com/node-health-status", "Schedulable"  # a label of HyperPod
IP, PODS, SERVICES = "10.88.0.1", "10.88.0.0/16", "10.96.0.0/16"

# From Debian's packages, which the Makefile lists.
NEEDED = [
    *("containerd", "ctr", "runc", "buildah", "mmdebstrap", "iptables", "conntrack", "ip", "sysctl", "openssl"),
    *("git", "go", "kubectl"),
]
PROGRAMS_OF_A_NODE = [*KUBERNETES_PROGRAMS, "etcd", "coredns", "containerd", "containerd-shim-runc-v2"]
CNI = Path("/usr/lib/cni")
BUSYBOX = Path("/bin/busybox")


def check_this_machine() -> None:
    """Raise UserError if something that the node needs is missing."""
    if os.geteuid() != 0:
        fix = "Use root, or a cluster of yours: make test-cluster CLUSTER=current"
        raise UserError("a Kubernetes node needs root", fix=fix)
    os.environ["PATH"] = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    missing = [name for name in NEEDED if not shutil.which(name)]
    missing += [str(path) for path in (CNI, BUSYBOX) if not path.exists()]
    if missing:
        raise UserError(
            f"not on this machine: {', '.join(missing)}", fix="On Debian: make cluster-packages; then Go and kubectl"
        )


def start() -> None:
    """Clean up after an earlier node, start the node, and wait until it is ready."""
    stop()
    FOLDER.mkdir(parents=True)
    make_certificates()
    write_settings()
    make_bridge()
    start_program("etcd", program("etcd"), "--data-dir", FOLDER / "etcd", "--unsafe-no-fsync", *urls())
    start_api_server()
    forget_containers()
    start_containerd()
    kubeconfig = ["--kubeconfig", KUBECONFIG]
    start_program(
        "controller-manager",
        program("kubernetes/kube-controller-manager"),
        *kubeconfig,
        *("--service-account-private-key-file", FOLDER / "sa.key"),
        *("--root-ca-file", FOLDER / "ca.crt"),
        "--use-service-account-credentials",
        "--leader-elect=false",
    )
    start_program("scheduler", program("kubernetes/kube-scheduler"), *kubeconfig, "--leader-elect=false")
    start_program(
        "proxy",
        program("kubernetes/kube-proxy"),
        *kubeconfig,
        *("--cluster-cidr", PODS, "--hostname-override", NODE, "--conntrack-max-per-core", "0"),
        *("--proxy-mode", "iptables"),
    )
    start_program("coredns", program("coredns"), "-conf", FOLDER / "Corefile")
    start_program(
        "kubelet",
        program("kubernetes/kubelet"),
        *kubeconfig,
        *("--config", FOLDER / "kubelet.yaml", "--hostname-override", NODE),
        *("--root-dir", FOLDER / "kubelet", "--node-ip", IP),
    )
    provisioner = Path(__file__).with_name("provisioner.py")
    start_program("provisioner", sys.executable, provisioner, KUBECONFIG, FOLDER / "volumes")
    wait_for("the node", "kubelet", lambda: "True" in kubectl("get", "node", NODE, "-o", READY, check=False))
    wait_for("an account", "controller-manager", lambda: bool(kubectl("get", "sa", "-o", "name", check=False)))


READY = "jsonpath={.status.conditions[?(@.type=='Ready')].status}"


def urls() -> list[str]:
    client, peer = "http://127.0.0.1:2379", "http://127.0.0.1:2380"
    return ["--listen-client-urls", client, "--advertise-client-urls", client, "--listen-peer-urls", peer]


def start_api_server() -> None:
    start_program(
        "apiserver",
        program("kubernetes/kube-apiserver"),
        *("--etcd-servers", "http://127.0.0.1:2379", "--service-cluster-ip-range", SERVICES),
        *("--authorization-mode", "Node,RBAC", "--allow-privileged"),
        *("--tls-cert-file", FOLDER / "api.crt", "--tls-private-key-file", FOLDER / "api.key"),
        *("--client-ca-file", FOLDER / "ca.crt"),
        *("--kubelet-client-certificate", FOLDER / "admin.crt", "--kubelet-client-key", FOLDER / "admin.key"),
        *("--service-account-key-file", FOLDER / "sa.pub", "--service-account-signing-key-file", FOLDER / "sa.key"),
        *("--service-account-issuer", "https://kubernetes.default.svc"),
        *("--secure-port", "6443", "--bind-address", "0.0.0.0", "--advertise-address", IP),
        *("--kubelet-preferred-address-types", "InternalIP"),
    )
    wait_for("the API server", "apiserver", lambda: kubectl("get", "--raw", "/readyz", check=False) == "ok")


def restart_api_server(away: float) -> None:
    """Stop the API server for ``away`` seconds."""
    stop_program("apiserver")
    time.sleep(away)
    start_api_server()


def start_containerd() -> None:
    start_program("containerd", "containerd", "--config", FOLDER / "containerd.toml")
    wait_for("containerd", "containerd", lambda: SOCKET.exists() and not ctr("version", check=False).returncode)


def forget_containers() -> None:
    """Delete the containers of the node's pods; its images are kept."""
    start_containerd()
    for container in ctr("containers", "ls", "-q").stdout.split():
        ctr("containers", "rm", container)
    stop_program("containerd")


def stop() -> None:
    """Stop everything that belongs to a node in the folder, also after its starter was killed."""
    for name in ["provisioner", "kubelet", "proxy", "scheduler", "controller-manager", "coredns"]:
        stop_program(name)
    containers = [path.name for path in (FOLDER / "containerd/io.containerd.runtime.v2.task/k8s.io").glob("*")]
    end(processes_of_containers(containers), signal.SIGKILL)
    end(processes_that_name(FOLDER), signal.SIGTERM)
    end(processes_that_name(FOLDER), signal.SIGKILL)
    unmount_below(FOLDER)
    if FOLDER.exists():
        forget_network()
        shutil.rmtree(FOLDER)


def stop_program(name: str) -> None:
    file = FOLDER / f"{name}.pid"
    if file.exists():
        pid = int(file.read_text())
        if pid in processes_that_name(FOLDER):  # else the process ID was reused
            end([pid], signal.SIGTERM)
            end([pid], signal.SIGKILL)
        file.unlink()


def start_program(name: str, *command: str | Path) -> None:
    with (FOLDER / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=FOLDER,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "GOGC": "400"},  # a sixth of the API server's time goes to its garbage otherwise
            start_new_session=True,
            umask=0o022,  # with 077 only root could read the roots of images
        )
    (FOLDER / f"{name}.pid").write_text(str(process.pid))


def wait_for(what: str, log: str, happens: Callable[[], bool], seconds: float = 300.0) -> None:
    ends = time.monotonic() + seconds
    while not happens():
        if time.monotonic() > ends:
            tail = (FOLDER / f"{log}.log").read_text(errors="replace")[-3000:]
            raise UserError(f"{what} is not there after {seconds:.0f} s. The end of {log}.log:\n{tail}")
        time.sleep(0.3)


def kubectl(*arguments: str | Path, check: bool = True, text: str | None = None) -> str:
    command = ["kubectl", "--kubeconfig", str(KUBECONFIG), *map(str, arguments)]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        raise UserError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()


def ctr(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = ["ctr", "--address", str(SOCKET), "--namespace", "k8s.io", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=check)


def pretend_to_be_trainium() -> None:
    """Report the devices of a trn1.32xlarge, so that scheduling is real. The CPU backend needs no driver."""
    capacity = {"aws.amazon.com/neuron": "16", "vpc.amazonaws.com/efa": "8", "example.com/few": "1"}
    kubectl("patch", "node", NODE, "--subresource=status", "-p", json.dumps({"status": {"capacity": capacity}}))
    kubectl("label", "node", NODE, "--overwrite", f"{INSTANCE_LABEL}={INSTANCE_TYPE}", f"{HEALTH}={HEALTHY}")


# --- what belongs to the node


def processes() -> Iterable[Path]:
    return (path for path in Path("/proc").glob("[0-9]*") if int(path.name) != os.getpid())


def processes_that_name(folder: Path) -> list[int]:
    """Programs of a node that have ``folder`` in their command line (not, for example, a shell in that folder), other
    programs from the cache, and the Helm of a killed test."""
    found = []
    for path in processes():
        command = read(path / "cmdline").split("\0")
        is_program = Path(command[0]).name in {*PROGRAMS_OF_A_NODE, Path(sys.executable).name}
        is_from_cache = command[0].startswith(f"{CACHE}/programs/")
        is_helm = Path(command[0]).name == "helm" and f"KUBECONFIG={folder}/kubeconfig" in read(path / "environ")
        if is_from_cache or is_helm or (is_program and any(str(folder) in part for part in command)):
            found.append(int(path.name))
    return found


def processes_of_containers(containers: list[str]) -> list[int]:
    return [int(path.name) for path in processes() if any(one in read(path / "cgroup") for one in containers)]


def read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def end(pids: Iterable[int], how: signal.Signals, patience: float = 15.0) -> None:
    """Signal the processes and wait until they are gone."""
    left = list(pids)
    for pid in left:
        try:
            os.kill(pid, how)
        except ProcessLookupError:
            continue
    ends = time.monotonic() + patience
    while (left := [pid for pid in left if is_running(pid)]) and time.monotonic() < ends:
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # reap it if it is a child of this process
    return read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()[:1] not in ([], ["Z"])


def unmount_below(folder: Path) -> None:
    points = [line.split()[1] for line in read(Path("/proc/mounts")).splitlines()]
    for point in sorted((p for p in points if p.startswith(f"{folder}/")), reverse=True):
        subprocess.run(["umount", "--lazy", point], check=False, capture_output=True)


def make_bridge() -> None:
    run("ip", "link", "add", BRIDGE, "type", "bridge", check=False)
    run("ip", "address", "add", f"{IP}/16", "dev", BRIDGE, check=False)
    run("ip", "link", "set", BRIDGE, "up")
    run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    if shutil.which("modprobe"):  # built in, or not loadable in a container; pods on one bridge work without it
        run("modprobe", "br_netfilter", check=False)
    run("sysctl", "-qw", "net.bridge.bridge-nf-call-iptables=1", check=False)


def forget_network() -> None:
    """Remove the bridge, the rules of kube-proxy, and those of pods whose network was not removed."""
    if program("kubernetes/kube-proxy").exists():
        run(str(program("kubernetes/kube-proxy")), "--cleanup", check=False)
    run("ip", "link", "delete", BRIDGE, check=False)
    rules = run("iptables-save", "--table", "nat", check=False)
    ours = {chain for line in rules.splitlines() if NETWORK in line for chain in re.findall(r"CNI-[0-9a-f]+", line)}
    if ours:
        kept = [line for line in rules.splitlines() if not any(chain in line for chain in ours)]
        subprocess.run(["iptables-restore", "--table", "nat"], input="\n".join([*kept, ""]), text=True, check=False)


def run(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        raise UserError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


# --- settings


def make_certificates() -> None:
    def openssl(*arguments: str | Path) -> None:
        run("openssl", *map(str, arguments))

    def signed(name: str, subject: str, names: str = "") -> None:
        key, request, certificate = (FOLDER / f"{name}.{suffix}" for suffix in ("key", "csr", "crt"))
        openssl("req", *NEW_KEY, "-keyout", key, "-out", request, "-subj", subject)
        extensions = FOLDER / f"{name}.ext"
        extensions.write_text(f"subjectAltName={names}" if names else "basicConstraints=CA:FALSE")
        authority = ["-CA", FOLDER / "ca.crt", "-CAkey", FOLDER / "ca.key", "-CAcreateserial", "-days", "30"]
        openssl("x509", "-req", "-in", request, *authority, "-out", certificate, "-extfile", extensions)

    authority = ["-keyout", FOLDER / "ca.key", "-out", FOLDER / "ca.crt", "-subj", "/CN=local-ca", "-days", "30"]
    openssl("req", "-x509", *NEW_KEY, *authority)
    service = "DNS:kubernetes.default.svc,DNS:kubernetes.default"
    signed("api", "/CN=kube-apiserver", f"DNS:localhost,{service},IP:127.0.0.1,IP:10.96.0.1,IP:{IP}")
    signed("admin", "/O=system:masters/CN=admin")
    openssl("genrsa", "-out", FOLDER / "sa.key", "2048")
    openssl("rsa", "-in", FOLDER / "sa.key", "-pubout", "-out", FOLDER / "sa.pub")
    for key in FOLDER.glob("*.key"):
        key.chmod(0o600)


NEW_KEY = ["-newkey", "rsa:2048", "-nodes"]


def write_settings() -> None:
    (FOLDER / "cni").mkdir()
    for name, text in SETTINGS.items():
        (FOLDER / name).write_text(text)


SETTINGS = {
    "kubeconfig": f"""\
apiVersion: v1
kind: Config
clusters: [{{name: local, cluster: {{server: "https://127.0.0.1:6443", certificate-authority: {FOLDER}/ca.crt}}}}]
users: [{{name: admin, user: {{client-certificate: {FOLDER}/admin.crt, client-key: {FOLDER}/admin.key}}}}]
contexts: [{{name: local, context: {{cluster: local, user: admin}}}}]
current-context: local
""",
    "kubelet.yaml": f"""\
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failSwapOn: false
failCgroupV1: false
cgroupDriver: cgroupfs
localStorageCapacityIsolation: false
containerRuntimeEndpoint: unix://{SOCKET}
clusterDNS: ["{IP}"]
clusterDomain: cluster.local
authentication: {{anonymous: {{enabled: false}}, webhook: {{enabled: false}}, x509: {{clientCAFile: {FOLDER}/ca.crt}}}}
authorization: {{mode: AlwaysAllow}}
evictionHard: {{memory.available: 100Mi, nodefs.available: 1%, imagefs.available: 1%}}
imageGCHighThresholdPercent: 100      # what the cache holds cannot be pulled again
""",
    "cni/10-bridge.conflist": f"""\
{{"cniVersion": "0.4.0", "name": "{NETWORK}", "plugins": [
  {{"type": "bridge", "bridge": "{BRIDGE}", "isGateway": true, "ipMasq": true, "hairpinMode": true,
   "ipam": {{"type": "host-local", "dataDir": "{FOLDER}/cni/addresses",
             "ranges": [[{{"subnet": "{PODS}"}}]], "routes": [{{"dst": "0.0.0.0/0"}}]}}}}]}}
""",
    # restrict_oom_score_adj: without CAP_SYS_RESOURCE runc says "can't get final child's PID from pipe: EOF".
    "containerd.toml": f"""\
version = 2
root = "{IMAGES}"
state = "{FOLDER}/containerd"
[grpc]
  address = "{SOCKET}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:1"
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{CNI}"
    conf_dir = "{FOLDER}/cni"
""",
    "Corefile": f"""\
.:53 {{
  bind {IP}
  errors
  kubernetes cluster.local in-addr.arpa {{
    kubeconfig {KUBECONFIG} local
  }}
}}
""",
}
