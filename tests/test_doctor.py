"""Doctor: real sites' answers in, findings out; the command on a real SLURM; and what submission makes of it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.check import ConfigError
from conf.schema import Cluster, Config, Container, Model, Node, Paths, Pipeline, Slurm
from launchers import devcluster as dc
from launchers import diagnosis, doctor, preflight, site, slurm
from launchers.diagnosis import Asked, Finding, Job
from launchers.site import Limits, Site
from launchers.slurm import Unknown
from tests.slurm_fixture import submit, wait_for, wait_state

ROOT = Path(__file__).resolve().parent.parent

# What `scontrol show config` printed on real clusters, the lines that doctor reads. Their values are those of:
# spider, a production cluster of 2020; compute-cluster, a university's GPU cluster of 2026, of which the published
# text ends in the middle; demo-cluster, a cluster of one node of 2024; mycluster, SLURM in a container; and dev, ours.
SPIDER = """Configuration data as of 2020-03-18T22:00:04
AccountingStorageEnforce = associations,limits
AccountingStorageType   = accounting_storage/slurmdbd
AuthInfo                = (null)
BatchStartTimeout       = 10 sec
ClusterName             = spider
EnforcePartLimits       = ALL
Epilog                  = /data/tmpdir-epilogue.sh
JobRequeue              = 0
JobSubmitPlugins        = (null)
KillWait                = 30 sec
MaxArraySize            = 1001
MaxJobCount             = 10000
MinJobAge               = 300 sec
OverTimeLimit           = 0 min
PowerPlugin             = \n\
PreemptMode             = OFF
PreemptType             = preempt/none
ProctrackType           = proctrack/cgroup
RequeueExit             = (null)
SelectType              = select/cons_res
SelectTypeParameters    = CR_CORE_MEMORY
SlurmdTimeout           = 300 sec
SLURM_VERSION           = 19.05.5
TaskPlugin              = affinity,cgroup
TaskPluginParam         = (null type)
UnkillableStepTimeout   = 60 sec

Cgroup Support Configuration:
ConstrainCores          = yes
ConstrainDevices        = no
"""
UNIVERSITY = """Configuration data as of 2026-04-09T01:09:47
AccountingStorageEnforce = associations,limits,qos
AccountingStorageType   = accounting_storage/slurmdbd
AuthAltParameters       = jwt_key=/etc/slurm/jwt_hs256.key
AuthInfo                = (null)
BatchStartTimeout       = 10 sec
ClusterName             = compute-cluster
DependencyParameters    = (null)
EnforcePartLimits       = ANY
Epilog[0]               = /etc/slurm/epilog.d/*.sh
JobCompLoc              = http://cloud-vm-45-09.doc.ic.ac.uk:9200/slurmdev/_doc
JobRequeue              = 1
JobSubmitPlugins        = lua
KillWait                = 30 sec
LaunchParameters        = use_interactive_step,ulimit_pam_adopt,slurmstepd_memlock
"""
DEMO = """
    Configuration data as of 2024-08-19T19:08:02
    AccountingStorageEnforce = none
    AccountingStorageType   = accounting_storage/slurmdbd
    AuthInfo                = socket=/var/run/munge/munge.socket.2
    BatchStartTimeout       = 10 sec
    ClusterName             = demo-cluster
    DependencyParameters    = (null)
    EnforcePartLimits       = NO
    JobRequeue              = 1
    JobSubmitPlugins        = (null)
    KillWait                = 30 sec
    MaxArraySize            = 1001
    MaxBatchRequeue         = 5
    MaxJobCount             = 10000
    MinJobAge               = 300 sec
    OverTimeLimit           = 0 min
    PreemptMode             = OFF
    PreemptType             = preempt/none
    ProctrackType           = proctrack/linuxproc
    RequeueExit             = (null)
    SelectType              = select/cons_res
    SlurmdTimeout           = 60 sec
    SLURM_VERSION           = 23.02.7
    TaskPlugin              = task/none
    UnkillableStepTimeout   = 60 sec
"""
CONTAINER = """Configuration data as of 2020-03-18T22:00:04
AccountingStorageEnforce = none
AccountingStorageType   = accounting_storage/filetxt
AuthInfo                = (null)
BatchStartTimeout       = 2 sec
ClusterName             = mycluster
EnforcePartLimits       = NO
JobRequeue              = 1
KillWait                = 2 sec
MaxArraySize            = 1001
MaxJobCount             = 10000
MinJobAge               = 2 sec
OverTimeLimit           = 0 min
PreemptMode             = OFF
PreemptType             = preempt/none
ProctrackType           = proctrack/linuxproc
SelectType              = select/linear
SlurmdTimeout           = 2 sec
SLURM_VERSION           = 19.05.5
"""
DEV = """Configuration data as of 2026-11-22T01:08:26
AccountingStorageEnforce = none
AccountingStorageType   = accounting_storage/none
AuthInfo                = socket=/tmp/c/run/munge.socket,cred_expire=5
BatchStartTimeout       = 10 sec
ClusterName             = dev
DependencyParameters    = (null)
EnforcePartLimits       = NO
JobRequeue              = 1
JobSubmitPlugins        = (null)
KillWait                = 10 sec
MaxArraySize            = 1001
MaxJobCount             = 10000
MinJobAge               = 300 sec
OverTimeLimit           = 0 min
PreemptMode             = REQUEUE
PreemptType             = preempt/partition_prio
ProctrackType           = proctrack/linuxproc
RequeueExit             = (null)
SelectType              = select/cons_tres
SlurmdTimeout           = 30 sec
SLURM_VERSION           = 22.05.8
TaskPlugin              = task/none
UnkillableStepTimeout   = 60 sec
"""
ENFORCING = DEV.replace("Enforce = none", "Enforce = limits,safe").replace("accounting_storage/none", "a_s/slurmdbd")
# Stanford's FarmShare, 2026, as published by a user who tried each limit out with `sbatch --test-only`
FARM = """PartitionName=normal
   AllowGroups=ALL AllowAccounts=ALL AllowQos=normal,long,interactive,dev
   AllocNodes=ALL Default=YES QoS=normal
   DefaultTime=02:00:00 DisableRootJobs=NO Exclusive=NO GraceTime=0 Hidden=NO
   MaxNodes=UNLIMITED MaxTime=2-00:00:00 MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED MaxCPUsPerSocket=UNLIMITED
   OverTimeLimit=NONE PreemptMode=OFF
   State=UP TotalCPUs=2560 TotalNodes=20 SelectTypeParameters=NONE

PartitionName=gpu
   AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL
   AllocNodes=ALL Default=NO QoS=gpu
   DefaultTime=02:00:00 DisableRootJobs=NO Exclusive=NO GraceTime=0 Hidden=NO
   MaxNodes=UNLIMITED MaxTime=2-00:00:00 MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED MaxCPUsPerSocket=UNLIMITED
   OverTimeLimit=NONE PreemptMode=OFF
   State=UP TotalCPUs=384 TotalNodes=6 SelectTypeParameters=NONE
   TRES=cpu=384,mem=1500G,node=6,billing=384,gres/gpu=24
"""
FARM_NODES = """normal*|drained*|3|(null)|CLASS:A
normal*|mixed|17|(null)|CLASS:A
gpu|mixed|5|gpu:4(S:0-1)|CPU_GEN:SPR,GPU_SKU:L40S,GPU_CC:8.9
gpu|allocated|1|gpu:4(S:0-1)|CPU_GEN:SPR,GPU_SKU:L40S,GPU_CC:8.9
"""
FARM_GROUPS = """normal*|up|2-00:00:00|20|80|191000|(null)
gpu|up|2-00:00:00|6|64|256000|gpu:4(S:0-1)
"""
FARM_QOS = """normal|DenyOnLimit|00:00:00|cluster||128|1024||cpu=512,gres/gpu=1||
interactive|DenyOnLimit|00:00:00|cluster||4|4||cpu=16,mem=64G||
dev|DenyOnLimit|00:00:00|cluster|08:00:00|1|1||cpu=8,mem=32G||
long|DenyOnLimit,PartitionTimeLimit|00:00:00|cluster|7-00:00:00|4|32||cpu=128||
gpu|DenyOnLimit|00:00:00|cluster||4|32||gres/gpu=4||
"""
FARM_USER = "farmshare|operator||bigmem,caddyshack,dev,gpu,interactive,long,normal|normal||||||\n"
# What our own SLURM 22.05.8 with accounting printed, for a QOS and an association with limits
OUR_QOS = """normal||00:00:00|cluster|||||||
long|DenyOnLimit,OverPartQOS|00:01:00|requeue|2-00:00:00||20|gres/gpu=8,node=2|gres/gpu=16|gres/gpu=64|
"""
OUR_USER = "dev|lab||long,normal||5|12|08:00:00|||\ndev|root||long,normal||5|12|08:00:00|||\n"
# A university's cluster, 2025: a partition that cancels what it preempts, and one that takes two QOS alone
CANCELLING = (
    "PartitionName=skylake AllowGroups=ALL AllowAccounts=ALL AllowQos=normal,high Default=YES QoS=N/A GraceTime=0 "
    "MaxNodes=UNLIMITED MaxTime=21-00:00:00 PreemptMode=OFF State=UP TotalNodes=43 TRESBillingWeights=CPU=1.0,Mem=0\n"
    "PartitionName=agro-b AllowGroups=ALL AllowAccounts=ALL AllowQos=normal,gpupreempt Default=NO QoS=N/A "
    "DefaultTime=03:00:00 GraceTime=100 MaxNodes=UNLIMITED MaxTime=7-00:00:00 PreemptMode=CANCEL State=UP TotalNodes=2 "
    "TRES=cpu=48,mem=496000M,node=2,billing=72,gres/gpu=4 TRESBillingWeights=CPU=1.0,Mem=0,GRES/gpu=6.0\n"
    "PartitionName=agro AllowGroups=ALL AllowAccounts=def-nasem,def-mccartca AllowQos=normal Default=NO QoS=N/A "
    "GraceTime=0 MaxNodes=UNLIMITED MaxTime=21-00:00:00 PreemptMode=OFF State=UP TotalNodes=2\n"
)
OUR_PARTITIONS = (
    "PartitionName=gpu AllowGroups=ALL AllowQos=ALL Default=YES QoS=N/A GraceTime=0 MaxNodes=UNLIMITED "
    "MaxTime=UNLIMITED PreemptMode=OFF State=UP TotalNodes=4\n"
    "PartitionName=low AllowGroups=ALL AllowQos=ALL Default=NO QoS=N/A GraceTime=20 MaxNodes=UNLIMITED "
    "MaxTime=UNLIMITED PreemptMode=REQUEUE State=UP TotalNodes=4\n"
)
OUR_NODES = "gpu*|idle|4|gpu:h100:8|(null)\nlow|idle|4|gpu:h100:8|(null)\n"
OUR_GROUPS = "gpu*|up|infinite|4|96|1920000|gpu:h100:8\nlow|up|infinite|4|96|1920000|gpu:h100:8\n"
NO = Unknown("it did not answer")


def answers(config: str | Unknown = DEV, **others: Any) -> Asked:
    """What our cluster answers, but for what a test says."""
    usual = Asked(
        "slurm-wlm 22.05.8\n", "Slurmctld(primary) at vm is UP\n", 0.03, config, OUR_PARTITIONS, OUR_NODES,
        OUR_QOS, OUR_USER, "", slurm.parse_partitions(OUR_GROUPS), "No reservations in the system\n",
    )  # fmt: skip
    return replace(usual, **others)


FARMSHARE = answers(
    ENFORCING.replace("ClusterName             = dev", "ClusterName             = farmshare"),
    partitions=FARM, nodes=FARM_NODES, qos=FARM_QOS, associations=FARM_USER, groups=slurm.parse_partitions(FARM_GROUPS),
)  # fmt: skip


def config(**asks: Any) -> Config:
    return Config(slurm=Slurm(**{"gpus_per_node": 1, "cpus_per_gpu": 1, **asks}))


def named(found: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in found}


def levels(found: list[Finding], *wanted: str) -> dict[str, str]:
    return {f.name: f.level for f in found if f.level in wanted}


# ------------------------------------------------------------------------------- settings of real clusters


def test_a_production_cluster() -> None:
    found = diagnosis.judge_settings(SPIDER, config(gpus_per_node=0))
    assert levels(found, "note", "unknown", "warning", "problem") == {
        "JobRequeue": "note", "TaskPlugin": "note", "SelectType": "note",
    }  # fmt: skip
    by = named(found)
    assert by["requeue hold"].seen.startswith("121 s")
    assert "--requeue" in by["JobRequeue"].fix and "ConstrainDevices" in by["TaskPlugin"].seen
    assert by["AccountingStorageType"].seen == "slurmdbd, enforces associations,limits"
    assert named(diagnosis.judge_settings(SPIDER, config(gpus_per_node=1)))["SelectType"].level == "problem"


def test_settings_that_a_site_does_not_say_are_not_known() -> None:
    found = diagnosis.judge_settings(UNIVERSITY, config())
    unknown = levels(found, "unknown")
    assert {"MaxArraySize", "MinJobAge", "SlurmdTimeout", "ProctrackType", "SelectType", "RequeueExit"} <= set(unknown)
    by = named(found)
    assert by["KillWait"].level == by["JobRequeue"].level == "ok"
    assert by["JobSubmitPlugins"].level == "note" and by["JobSubmitPlugins"].seen == "lua"
    known = diagnosis.site_of(answers(UNIVERSITY), config(), 1.0)
    assert known.kill_wait_seconds == 30 and known.max_array_size is None and known.limits_enforced is True


def test_small_and_old_clusters() -> None:
    assert levels(diagnosis.judge_settings(DEMO, config()), "warning", "problem") == {
        "ProctrackType": "warning", "SelectType": "problem",
    }  # fmt: skip
    found = named(diagnosis.judge_settings(CONTAINER, config(gpus_per_node=0)))
    assert found["KillWait"].level == "note" and found["MinJobAge"].level == "warning"
    assert found["AccountingStorageType"].seen == "accounting_storage/filetxt: no sacct"
    assert found["TaskPlugin"].level == "unknown"  # that text has none


def test_our_own_cluster() -> None:
    found = diagnosis.judge(answers(), config(gpu_type="h100"))
    assert levels(found, "warning", "problem", "unknown") == {"ProctrackType": "warning"}
    known = diagnosis.site_of(answers(), config(), 5.0)
    assert (known.requeue_hold, known.kill_wait_seconds, known.max_array_size) == (6.0, 10, 1001)
    assert known.preempts and known.default_partition == "gpu" and known.limits_enforced is False
    assert known.preemption("gpu", None) is None and known.preemption("low", None) == ("REQUEUE", 30)


@pytest.mark.parametrize(
    ("setting", "name", "level"),
    [
        ("SlurmdTimeout           = 0 sec", "SlurmdTimeout", "warning"),
        ("RequeueExit             = 1,137", "RequeueExit", "warning"),
        ("MaxArraySize            = 0", "MaxArraySize", "note"),
        ("OverTimeLimit           = UNLIMITED", "OverTimeLimit", "note"),
        ("AuthInfo                = cred_expire=3600", "requeue hold", "warning"),
        ("UnkillableStepTimeout   = 10 sec", "UnkillableStepTimeout", "note"),
        ("KillWait                = 60 sec", "KillWait", "ok"),
        ("KillWait                = soon", "KillWait", "unknown"),
    ],
)
def test_single_settings(setting: str, name: str, level: str) -> None:
    key = setting.split()[0]
    text = re.sub(rf"^{key} .*$", setting, DEV, flags=re.MULTILINE)
    assert text != DEV
    assert named(diagnosis.judge_settings(text, config()))[name].level == level


# ------------------------------------------------------------------------ partitions, preemption and limits


def test_preemption_that_cancels() -> None:
    preempting = re.sub("preempt/partition_prio", "preempt/qos", DEV)
    asked = answers(preempting, partitions=CANCELLING)
    found = named(diagnosis.judge_preemption(asked, config(partition="agro-b")))["preemption"]
    assert found.level == "warning" and "CANCEL" in found.seen and "110 s" in found.seen
    assert named(diagnosis.judge_preemption(asked, config()))["preemption"].level == "ok"
    assert diagnosis.judge_preemption(answers(SPIDER, partitions=CANCELLING), config())[0].level == "ok"


def test_preemption_with_less_time_than_a_save_takes() -> None:
    late = diagnosis.judge_preemption(answers(), config(partition="low", signal_time_seconds=31))[0]
    assert late.level == "warning" and "30 s" in late.seen and "save_minutes" in late.fix
    assert diagnosis.judge_preemption(answers(), config(partition="low", signal_time_seconds=30))[0].level == "ok"


@pytest.mark.parametrize(
    ("asks", "name", "words"),
    [
        ({"partition": "gpuu"}, "request", "did you mean 'gpu'"),
        ({"partition": "gpu", "gpus_per_node": 5}, "request", "slurm.gpus_per_node=4"),
        ({"partition": "gpu", "gpu_type": "h100"}, "request", "slurm.gpu_type"),
        ({"partition": "gpu", "wall_time": "2-00:00:01"}, "request", "slurm.wall_time=48:00:00"),
        ({"partition": "gpu", "gpus_per_node": 4, "num_nodes": 2}, "GPUs of a user", "4 at most"),
        ({"partition": "gpu", "qos": "longer"}, "QOS", "did you mean 'long'"),
        ({"partition": "normal", "qos": "gpu", "gpus_per_node": 0}, "normal", "slurm.qos: valid: dev"),
        ({"partition": "gpu", "qos": "long", "wall_time": "8-00:00:00"}, "wall time", "slurm.wall_time=7-00:00:00"),
        ({"partition": "gpu", "account": "operater"}, "account", "did you mean 'operator'"),
        ({"partition": "gpu", "constraint": "GPU_SKU:L40"}, "constraint", "did you mean 'GPU_SKU:L40S'"),
    ],
)
def test_what_farmshare_refuses(asks: dict[str, Any], name: str, words: str) -> None:
    found = diagnosis.judge(FARMSHARE, config(**asks))
    wrong = {f.name: f for f in found if f.level == "problem"}
    assert name in wrong and set(wrong) <= {name, "GPUs of a user"} and words in wrong[name].fix


@pytest.mark.parametrize(
    "asks",
    [
        {"partition": "gpu", "wall_time": "48:00:00", "gpus_per_node": 4},
        # seen there with --test-only: QOS `long` goes beyond the partition's two days
        {"partition": "gpu", "wall_time": "7-00:00:00", "qos": "long", "gpus_per_node": 2},
        {"partition": "gpu", "constraint": "[GPU_SKU:L40S*2&CPU_GEN:SPR]"},
        {"gpus_per_node": 0, "account": "operator"},
    ],
)
def test_what_farmshare_takes(asks: dict[str, Any]) -> None:
    assert levels(diagnosis.judge(FARMSHARE, config(**asks)), "problem", "unknown") == {}


def test_limits_come_from_the_first_that_sets_one() -> None:
    known = diagnosis.site_of(answers(ENFORCING), config(), 1.0)
    assert known.limit("max_wall_seconds", None, None) == (8 * 3600, "your association")
    assert known.limit("max_wall_seconds", None, "long") == (2 * 86400, "QOS long")
    assert known.limit("gpus_per_job", None, "long") == (8, "QOS long")
    assert known.max_submit_jobs == 12  # of QOS long's 20 and the association's 12 the smaller, without a QOS 12
    farm = diagnosis.site_of(FARMSHARE, config(partition="gpu"), 1.0)
    assert farm.limit("gpus_per_user", "gpu", "normal") == (4, "QOS gpu of partition gpu")
    assert farm.limit("gpus_per_user", "normal", None) == (1, "QOS normal of partition normal")
    assert farm.max_submit_jobs == 32
    over = replace(farm, qos={**(farm.qos or {}), "normal": Limits(gpus_per_user=1, flags=("OverPartQOS",))})
    assert over.limit("gpus_per_user", "gpu", "normal") == (1, "QOS normal")
    assert replace(farm, limits_enforced=False).limit("gpus_per_user", "gpu", None) is None


def test_an_association_is_of_one_account() -> None:
    users = OUR_USER.replace("root||long,normal||5|12|08:00:00", "root||normal||5|12|01:00:00")
    asked = answers(ENFORCING, associations=users)
    lab = diagnosis.site_of(asked, config(account="lab"), 1.0)
    assert lab.charged_to("lab").limit("max_wall_seconds", None, None) == (8 * 3600, "your association")
    assert lab.charged_to("root").limit("max_wall_seconds", None, None) is None
    assert lab.charged_to(None).limit("max_wall_seconds", None, None) is None
    # two that differ: which is the default, nobody said
    assert diagnosis.site_of(asked, config(), 1.0).association is None


def test_more_stages_than_may_be_queued() -> None:
    cfg = replace(config(), pipeline=Pipeline("p", {f"s{i}": Node("sft") for i in range(13)}))
    found = named(diagnosis.judge_limits(answers(ENFORCING), cfg))["queued jobs"]
    assert found.level == "problem" and "12" in found.seen


def test_nodes_that_are_down() -> None:
    nodes = "gpu*|down*|3|gpu:h100:8|(null)\ngpu*|drained|1|gpu:h100:8|(null)\nlow|idle|4|(null)|(null)\n"
    found = named(diagnosis.judge_partition(answers(nodes=nodes), config()))["nodes"]
    assert found.level == "problem" and found.seen == "0 of 4 up (3 down*, 1 drained); 32 h100 GPUs"
    one = named(diagnosis.judge_partition(answers(nodes=nodes.replace("drained", "mixed")), config()))["nodes"]
    assert (
        one.level == "warning" and doctor.job_nodes(config(), answers(nodes=nodes), Site(default_partition="gpu")) == 1
    )


def test_maintenance() -> None:
    text = (
        "ReservationName=course StartTime=2026-11-22T01:00:00 EndTime=2026-11-22T09:00:00 Nodes=n1 Flags=SPEC_NODES\n"
        "ReservationName=patch_day StartTime=2026-11-22T04:56:32 EndTime=2026-11-22T06:56:32 Duration=02:00:00 "
        "Nodes=n[1-4] NodeCnt=4 PartitionName=(null) Flags=MAINT,SPEC_NODES,ALL_NODES Users=root State=INACTIVE\n"
    )

    def seen(at: str, **asks: Any) -> Finding:
        now = datetime.fromisoformat(at).timestamp()
        return named(diagnosis.judge(answers(reservations=text, now=now), config(**asks)))["maintenance"]

    soon = seen("2026-11-22T01:56:32", wall_time="04:00:00")
    assert soon.level == "warning" and "patch_day" in soon.seen and "slurm.wall_time=180" in soon.fix
    assert seen("2026-11-22T01:56:32", wall_time="02:59:00").level == "note"
    assert seen("2026-11-22T05:00:00").fix == "wait" and seen("2026-11-22T07:00:00").level == "ok"


# ----------------------------------------------------------------------------------- nothing is made up


def test_a_silent_source_is_not_known() -> None:
    sources = ("config", "partitions", "nodes", "qos", "associations", "groups", "reservations")
    usual = named(diagnosis.judge(answers(ENFORCING), config()))
    for source in sources:
        found = diagnosis.judge(answers(**{"config": ENFORCING, source: NO}), config())
        assert "unknown" in {f.level for f in found}, source
        assert all("not known" in f.seen for f in found if f.level == "unknown")
        assert {f.name for f in found if f.level == "ok"} <= set(usual)
    silent = diagnosis.judge(Asked.nothing(NO, NO, NO, 1.0), config())
    assert {f.level for f in silent} == {"unknown", "problem"}
    assert diagnosis.site_of(Asked.nothing(NO, NO, NO, 1.0), config(), 1.0) == Site(asked=1.0)


TEXT = st.one_of(
    st.text(max_size=200), st.sampled_from([DEV, SPIDER, OUR_QOS, FARM, OUR_NODES, FARM_USER, "||||||||||\n"]),
    st.lists(st.sampled_from([*DEV.splitlines(), *OUR_QOS.splitlines(), *FARM.splitlines(), "=", "a = b", "|" * 10]))
    .map("\n".join),
)  # fmt: skip


@settings(deadline=None)
@given(config_=TEXT, partitions=TEXT, nodes=TEXT, qos=TEXT, users=TEXT, ping=TEXT, version=TEXT)
def test_no_answer_breaks_it(**texts: str) -> None:
    asked = answers(
        texts["config_"], partitions=texts["partitions"], nodes=texts["nodes"], qos=texts["qos"],
        associations=texts["users"], ping=texts["ping"], version=texts["version"],
    )  # fmt: skip
    found = diagnosis.judge(asked, config(partition="gpu", qos="long", constraint="a&b"))
    assert found
    for finding in found:
        assert finding.why and finding.fix and finding.level in doctor.MARKS
        assert finding.level == "ok" or finding.fix != diagnosis.NOTHING
    kept = diagnosis.site_of(asked, config(), 1.0)
    assert site.Site(**vars(kept)) == kept


@settings(deadline=None)
@given(found=st.lists(st.builds(
    Finding, st.sampled_from(["SLURM", "limits"]), st.text(max_size=40), st.sampled_from(list(doctor.MARKS)),
    st.text(max_size=300), st.text(max_size=100), st.text(max_size=100),
)), width=st.integers(80, 200))  # fmt: skip
def test_the_report_fits(found: list[Finding], width: int) -> None:
    printed = list(doctor.lines(found, width))
    for line in printed:
        assert line.isprintable() and (len(line) <= width or max(map(len, line.split())) > 24)
    assert [line[:2] for line in printed if line.strip()].count("  ") >= len(found)


def test_the_table_says_what_the_json_says(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = diagnosis.judge(FARMSHARE, config(partition="gpu", gpus_per_node=5))
    order = doctor.Order(config(), tmp_path, job=False, wait_s=1, as_json=True)
    doctor.report(order, found, None, None)
    told = json.loads(capsys.readouterr().out)
    doctor.report(replace(order, as_json=False), found, None, None)
    table = " ".join(capsys.readouterr().out.split())
    for one in told["findings"]:
        for word in (one["name"], one["seen"], *((one["why"], one["fix"]) if one["level"] != "ok" else ())):
            assert " ".join(word.split()) in table
    assert told["counts"]["problem"] == 2 and "2 problems" in table


# -------------------------------------------------------------------------------------- folders and quotas

LUSTRE = """Disk quotas for usr xdtr108 (uid 514559):
     Filesystem    used   quota   limit   grace   files   quota   limit   grace
             ./  792.3M      0k  9.537T       -       9       0 2000000       -
"""
LUSTRE_KB = """Disk quotas for usr your_account (uid ****):
      Filesystem  kbytes   quota   limit   grace   files   quota limit  grace
        /lustre7 982177580       0 1000000000       - 443208230 0      0       -
uid **** is using default file quota setting
"""
LUSTRE_DOUBTFUL = """     Filesystem    kbytes    quota   limit   grace   files   quota   limit   grace
              /fred [1041408]  5242880 6291456       -     [0]       0       0       -
"""
NFS = """Disk quotas for user yangrongzheng (uid 6215):
     Filesystem   space   quota   limit   grace   files   quota   limit   grace
    /nfs_global    479G   5120G   7168G            352k   5000k  10000k
"""
OLD = """Disk quotas for user wp (uid 500):
     Filesystem  blocks   quota   limit   files   quota   limit
      /dev/hda6       4      10      10       1      10      10
"""


@pytest.mark.parametrize(
    ("text", "place", "used", "limit", "files", "file_limit"),
    [
        (LUSTRE, "./", int(792.3 * 1024**2), int(9.537 * 1024**4), 9, 2_000_000),
        (LUSTRE_KB, "/lustre7", 982177580 * 1024, 1000000000 * 1024, 443208230, None),
        (LUSTRE_DOUBTFUL, "/fred", 1041408 * 1024, 5242880 * 1024, 0, None),
        (NFS, "/nfs_global", 479 * 1024**3, 5120 * 1024**3, 352_000, 5_000_000),
        (OLD, "/dev/hda6", 4096, 10240, 1, 10),
    ],
)
def test_quotas(text: str, place: str, used: int, limit: int, files: int, file_limit: int | None) -> None:
    assert diagnosis.parse_quota(text, [place]) == diagnosis.Quota(used, limit, files, file_limit)
    assert diagnosis.parse_quota(text, ["/elsewhere"]) is None


def test_quota_findings() -> None:
    def level(used: int, limit: int | None, files: int = 1, most: int | None = None) -> str:
        return diagnosis._quota("t", {"used": used, "limit": limit, "files": files, "file_limit": most}).level

    assert [level(5, 10), level(95, 100), level(10, 10), level(5, None), level(1, 10, 99, 100)] == [
        "ok", "warning", "problem", "ok", "warning",
    ]  # fmt: skip
    assert diagnosis._quota("t", None).level == "unknown"


def test_mounts() -> None:
    table = (
        "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
        "40 22 0:35 / /scratch rw shared:2 - lustre 10.0.0.1@o2ib:/scratch rw\n"
        "41 22 0:36 / /with\\040space rw - nfs4 server:/x rw\nbroken\n"
    )
    assert doctor.mount_of(Path("/scratch/me"), table) == ("lustre", "10.0.0.1@o2ib:/scratch", "/scratch")
    assert doctor.mount_of(Path("/scratches"), table)[0] == "ext4"
    assert doctor.mount_of(Path("/with space/a"), table)[0] == "nfs4"


def test_a_folder(tmp_path: Path) -> None:
    good = doctor.probe_folder(tmp_path / "new folder")
    assert levels(diagnosis.judge_folder("paths.output_base", good), "problem") == {}
    assert list((tmp_path / "new folder").iterdir()) == []
    (tmp_path / "file").write_text("")
    bad = diagnosis.judge_folder("paths.output_base", doctor.probe_folder(tmp_path / "file" / "x"))
    assert [f.level for f in bad] == ["problem"] and "paths.output_base" in bad[0].fix
    worse = {**good, "room": 5e8, "inodes": 100, "rename": False, "append": False, "flock": "No locks available",
             "fsync_s": 3.0, "skew_s": -90.0}  # fmt: skip
    found = diagnosis.judge_folder("paths.output_base", worse)
    assert levels(found, "problem") == dict.fromkeys(
        ["room", "files (inodes)", "atomic rename", "appending", "locks (flock)", "clock of file server"], "problem"
    )
    assert levels(found, "warning") == {"fsync": "warning"}


# ---------------------------------------------------------------------------------------- what nodes saw

LOGIN = {"python": "3.11.7", "executable": "/env/python", "packages": {"torch": "2.13.0"}, "machine": "L",
         "host": "login1", "skew_s": 0.0}  # fmt: skip


def node(rank: int, **changes: Any) -> dict[str, Any]:
    """What a node of a sound cluster writes."""
    reader = {"rename_seen_s": 0.0, "reads": 100, "torn": 0, "missing": 0, "notice_s": 0.02, "lock_kept": True}
    writer = {"lines": 400, "lines_written": 400, "lines_bad": 0}
    usual: dict[str, Any] = {
        "rank": rank, "at": None, "done": True,
        "about": {
            "host": f"n{rank}", "node": f"n{rank}", "machine": f"M{rank}", "python": "3.11.7",
            "executable": "/env/python", "packages": {"torch": "2.13.0"},
            "limits": {"memlock": None, "nofile": 65536}, "cores": 12, "shm_bytes": 10**11, "tmp": "/tmp",
            "tmp_bytes": 10**11, "base_bytes": 10**13, "clock": 0.0,
            "scontrol": {"path": "/usr/bin/scontrol", "answers": True, "said": "is UP"},
        },
        "master": {"name": "n0", "port": 12345, "addresses": ["10.0.0.1"]},
        "gpus": {"visible": "0", "driver": True, "names": ["NVIDIA H100 80GB HBM3, 81559 MiB, 570.86"], "said": ""},
        "shared": {"skew_s": 0.0, **(reader if rank else writer)},
        "internet": {"url": "https://huggingface.co", "reached": True, "said": "200"},
        "torch": {"seconds": 5.0, "version": "2.13.0", "gpus": 1, "nccl": True},
        "all_reduce": {"backend": "nccl", "right": True, "first_s": 1.0, "seconds": 0.001, "gb_per_s": 40.0,
                       "bytes": 1, "ranks": 2},
    }  # fmt: skip
    for key, value in changes.items():
        usual[key] = {**usual[key], **value} if isinstance(value, dict) and "error" not in value else value
    return usual


def judged(*nodes: Mapping[str, Any], cfg: Config | None = None, **job: Any) -> list[Finding]:
    usual = Job(2, "7", facts=tuple(map(dict, nodes)), started=True, state="COMPLETED")
    return diagnosis.judge_job(replace(usual, **job), cfg or config(), LOGIN)


def test_sound_nodes() -> None:
    found = judged(node(0), node(1))
    assert {f.level for f in found} == {"ok"}
    assert "40.00 GB/s with nccl" in named(found)["all-reduce"].seen


@pytest.mark.parametrize(
    ("changes", "name", "level", "words"),
    [
        ({"about": {"packages": {"torch": None}}}, "packages", "problem", "cluster.python"),
        ({"about": {"packages": {"torch": "2.9.0"}}}, "packages", "warning", "one environment"),
        ({"about": {"python": "3.12.1"}}, "Python", "warning", "cluster.python"),
        ({"about": {"scontrol": {"path": None}}}, "scontrol", "problem", "slurm.setup"),
        ({"about": {"scontrol": {"path": "/x", "answers": False}}}, "scontrol", "problem", "reach the controller"),
        ({"about": {"limits": {"memlock": 65536, "nofile": 65536}}}, "limits (ulimit)", "note", "ulimit -l"),
        ({"about": {"limits": {"memlock": None, "nofile": 512}}}, "limits (ulimit)", "warning", "ulimit -n"),
        ({"about": {"shm_bytes": 67108864}}, "room", "warning", "/dev/shm"),
        ({"master": {"error": "gaierror"}}, "MASTER_ADDR", "problem", "MASTER_ADDR"),
        ({"gpus": {"visible": None}}, "GPUs", "problem", "gres.conf"),
        ({"torch": {"gpus": 0, "nccl": False}}, "GPUs", "problem", "CUDA"),
        ({"internet": {"reached": False}}, "internet", "warning", "offline=true"),
        ({"all_reduce": {"error": "TimeoutError"}}, "all-reduce", "problem", "NCCL_SOCKET_IFNAME"),
        ({"all_reduce": {"right": False}}, "all-reduce", "problem", "NCCL_DEBUG"),
        ({"all_reduce": {"gb_per_s": 0.9}}, "all-reduce", "warning", "NCCL_DEBUG"),
        ({"shared": {"error": "TimeoutError: a renamed file"}}, "between nodes", "problem", "paths.output_base"),
        ({"shared": {"skew_s": 400.0}}, "clock of nodes", "problem", "chrony"),
        ({"shared": {"lines": 399}}, "appending", "note", "NFS"),
        ({"at": "torch", "done": False}, "job", "problem", "exclude"),
    ],
)
def test_unsound_nodes(changes: dict[str, Any], name: str, level: str, words: str) -> None:
    found = judged(node(0, **changes), node(1))
    assert named(found)[name].level == level and words in named(found)[name].fix
    assert all(f.fix for f in found)


@pytest.mark.parametrize(
    ("changes", "name", "level"),
    [
        ({"torn": 1}, "atomic rename", "problem"), ({"missing": 2}, "atomic rename", "note"),
        ({"notice_s": 31.0}, "freshness", "warning"), ({"lock_kept": False}, "locks (flock)", "warning"),
    ],
)  # fmt: skip
def test_unsound_shared_folders(changes: dict[str, Any], name: str, level: str) -> None:
    assert named(judged(node(0), node(1, shared=changes)))[name].level == level


def test_whose_clock_is_ahead() -> None:
    found = named(judged(node(0, shared={"skew_s": -30.0}), node(1, shared={"skew_s": -30.0})))["clock of nodes"]
    assert found.seen == "30.0 s ahead" and found.level == "warning"  # the server is behind them, and not behind us


def test_jobs_that_saw_nothing() -> None:
    def one(**job: Any) -> Finding:
        (found,) = judged(**job)
        return found

    full = one(queued="Resources", expected="2026-11-22T09:00:00", waited=300.0)
    assert full.level == "unknown" and "09:00:00" in full.seen and "--wait" in full.fix
    assert one(skipped="--no-job").level == "unknown"
    assert "output_base" in one(started=False, state="FAILED").fix
    assert "cluster.python" in one(no_python=("n1: no such file",)).fix
    assert one(problem="SLURM refused the job: Invalid account").level == "problem"
    lost = judged(node(0), problem="SLURM fell silent: x")
    assert lost[0].level == "problem" and "1 of 2 nodes said nothing" in lost[0].seen


# ---------------------------------------------------------------------------------- what submission uses


def test_what_was_found_is_found_again(tmp_path: Path) -> None:
    known = replace(diagnosis.site_of(FARMSHARE, config(), time.time()), internet=False)
    path = site.write(tmp_path, "farm", known)
    assert site.read(tmp_path, "farm") == known and site.read(tmp_path, "other") == Site()
    old = replace(known, asked=time.time() - site.OLD_S - 60)
    site.write(tmp_path, "farm", old)
    assert site.read(tmp_path, "farm") == Site() and site.load(path) == old
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 2}))
    assert site.load(path) == Site()


@settings(deadline=None)
@given(st.dictionaries(
    st.sampled_from(sorted(vars(Site()))),
    st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
                 lambda inner: st.lists(inner, max_size=2) | st.dictionaries(
                     st.sampled_from(["gpu", "max_wall_seconds", "flags", "qos", "preempt_mode"]), inner, max_size=3)),
), st.integers(0, 400))  # fmt: skip
def test_damaged_files_break_nothing(found: dict[str, Any], cut: int) -> None:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        path = site.place(Path(folder), "x")
        path.parent.mkdir()
        text = json.dumps({**found, "asked": time.time(), "version": 1})
        path.write_text(text if cut > 200 else text[:cut])
        known = site.read(Path(folder), "x")
        assert known.requeue_hold >= 0
        for partition, qos in ((None, None), ("gpu", "gpu")):
            preflight.warnings_of(config(partition=partition, qos=qos), known)
            known.limit("max_wall_seconds", partition, qos)
        assert known.max_array_size is None or isinstance(known.max_array_size, int)


@pytest.fixture
def farm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """FarmShare, where doctor was."""
    monkeypatch.setattr(slurm, "installed", lambda: True)
    monkeypatch.setattr(slurm, "partitions", lambda conf: slurm.parse_partitions(FARM_GROUPS))
    site.write(tmp_path, "farm", replace(diagnosis.site_of(FARMSHARE, config(), time.time()), internet=False))
    yield tmp_path


def submitted(base: Path, offline: bool = True, **asks: Any) -> None:
    cfg = replace(config(partition="gpu", **asks), cluster=Cluster(name="farm", scheduler="slurm"), offline=offline,
                  model=Model(name_or_path="Qwen/Qwen3-0.6B"), paths=Paths(output_base=str(base)))  # fmt: skip
    preflight.check_cluster({"sft": cfg, "dpo": cfg})


@pytest.mark.parametrize(
    ("asks", "key", "fix"),
    [
        ({"qos": "long", "wall_time": "7-00:00:01"}, "slurm.wall_time", "slurm.wall_time=168:00:00 ("),
        ({"num_nodes": 2, "gpus_per_node": 4}, "slurm.num_nodes", "slurm.num_nodes=1 ("),
        ({"wall_time": "49:00:00"}, "slurm.wall_time", "slurm.wall_time=48:00:00"),
    ],
)
def test_submission_refuses_what_the_site_does_not_allow(farm: Path, asks: dict[str, Any], key: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        submitted(farm, **asks)
    assert caught.value.key == key and fix in caught.value.fix and "(stage sft)" in caught.value.problem


def test_submission_takes_what_the_site_allows(farm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    submitted(farm, qos="long", wall_time="7-00:00:00", gpus_per_node=4)
    assert capsys.readouterr().err == ""
    submitted(farm, offline=False)
    assert capsys.readouterr().err.count("warning: compute nodes of cluster=farm did not reach the hub") == 1
    site.place(farm, "farm").write_text('{"version": 1, "asked"')
    submitted(farm, num_nodes=2, gpus_per_node=4)
    with pytest.raises(ConfigError):  # without doctor, the partition's own limit holds
        submitted(farm, qos="long", wall_time="7-00:00:00")


def test_submission_warns_of_preemption() -> None:
    known = diagnosis.site_of(answers(), config(), 1.0)
    (text,) = preflight.warnings_of(config(partition="low", signal_time_seconds=300), known)
    assert "30 s to save" in text and "save_minutes" in text
    assert preflight.warnings_of(config(partition="low", signal_time_seconds=20), known) == []
    assert preflight.warnings_of(config(signal_time_seconds=300), known) == []


# --------------------------------------------------------------------------------------------- the command


def command(
    *tokens: str, env: Mapping[str, str] | None = None, cwd: Path | None = None, **options: Any
) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "launchers.doctor", *tokens]
    full = {**os.environ, **(env or {}), "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(argv, env=full, cwd=cwd or ROOT, stdout=pipe, stderr=pipe, text=True, **options)


def result(process: subprocess.Popen[str]) -> tuple[int, dict[str, Finding], str]:
    try:
        out, err = process.communicate(timeout=400)  # longer than its own patience, on a machine that is busy
    except subprocess.TimeoutExpired:
        process.terminate()  # it cancels its job
        _, err = process.communicate()
        pytest.fail(f"doctor hangs: {err}")
    assert "Traceback" not in err, err
    found = json.loads(out)["findings"] if out.startswith("{") else []
    return process.returncode, {f"{f['topic']}: {f['name']}": Finding(**f) for f in found}, err


def test_this_machine_without_slurm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["cluster=local", f"paths.output_base={tmp_path / 'runs'}", "slurm.cpus_per_gpu=1"]) == 0
    out = capsys.readouterr().out
    assert "this machine" in out and "settings" not in out
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["cluster=devv"], "did you mean 'dev'"),
        (["cluster=local", "slurm.nodes=3"], "slurm.num_nodes"),
        (["cluster=local", "--wait", "-3"], "--wait"),
        (["cluster=local", "sft.training.max_steps=3"], "all stages"),
    ],
)
def test_refusals(tokens: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(tokens) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and words in err and "fix:" in err


def test_the_script_quotes_what_it_is_given(tmp_path: Path) -> None:
    cfg = config(partition="a b", modules=["x; touch no"], env={"A": "$(touch no)"}, gpu_type="h100", qos="q'")
    text = doctor.job_script(cfg, tmp_path / "it's 100%", 2)
    assert "#SBATCH --partition='a b'\n" in text and "module load 'x; touch no'\n" in text
    assert "export A='$(touch no)'\n" in text and "#SBATCH --gpus-per-node=h100:1\n" in text
    assert "100%%/doctor.out" in text and "FOLDER='" in text and "#SBATCH --no-requeue\n" in text
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_the_script_takes_the_environment_of_the_jobs(tmp_path: Path) -> None:
    def script(**asks: Any) -> str:
        text = doctor.job_script(replace(config(), **asks), tmp_path / "a b", 2)
        assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
        return text

    venv = script(slurm=Slurm(venv="/envs/x"))
    assert "source /envs/x/bin/activate" in venv and "PYTHON=/envs/x/bin/python\n" in venv
    boxed = script(container=Container(image="/i.sif"))
    assert "python=(apptainer --silent exec" in boxed and '/i.sif env PYTHONNOUSERSITE=1 "$PYTHON")' in boxed
    assert "--container-image=/i.sqsh" in script(container=Container(image="/i.sqsh", runtime="pyxis"))
    assert diagnosis._scontrol([node(0, about={"scontrol": {"path": None}})["about"]], config()).level == "problem"
    inside = replace(config(), container=Container(image="/i.sif"))
    assert diagnosis._scontrol([node(0, about={"scontrol": {"path": None}})["about"]], inside).level == "unknown"


def environment_of(cluster: dc.Cluster) -> dict[str, str]:
    return {**cluster.env, "POST_TRAINING_DEVCLUSTER": str(cluster.dir)}


def jobs_of(cluster: dc.Cluster) -> list[str]:
    return cluster.run("squeue", "-h", "-n", "doctor", "-o", "%i %T").split()


@pytest.mark.slurm
def test_a_whole_look_on_two_nodes(devcluster: dc.Cluster, tmp_path: Path) -> None:
    base = tmp_path / "it's 100% %j"
    quoted = str(base).replace("'", "\\'")
    killed = base / ".doctor" / "of-a-command-that-was-killed"
    killed.mkdir(parents=True)
    os.utime(killed, (0, 0))
    argv = ["cluster=dev", f"paths.output_base='{quoted}'", "--json"]
    status, found, err = result(command(*argv, env=environment_of(devcluster)))
    assert status == 0, {name: f for name, f in found.items() if f.level == "problem"}
    assert {"n1", "n2"} <= set(re.findall(r"\bn\d\b", found["compute nodes: job"].seen))
    assert "gloo over 2 ranks" in found["compute nodes: all-reduce"].seen
    assert found["compute nodes: all-reduce"].level in ("ok", "warning")  # a busy machine is slow
    for name in ("Python", "packages", "scontrol", "MASTER_ADDR"):
        assert found[f"compute nodes: {name}"].level == "ok", found[f"compute nodes: {name}"]
    for name in ("clock of nodes", "atomic rename", "appending", "freshness", "locks (flock)"):
        assert found[f"shared folder: {name}"].level == "ok", found[f"shared folder: {name}"]
    assert "emulates" in found["compute nodes: GPUs"].seen
    assert found["settings: requeue hold"].seen.startswith("6 s")
    known = site.read(base, "dev")
    assert known.slurm_cluster == "dev" and known.requeue_hold == 6 and known.internet is not None
    assert [path.name for path in base.iterdir()] == [".sites"] and jobs_of(devcluster) == []
    assert "looks around" in err


@pytest.mark.slurm
def test_a_full_partition(devcluster: dc.Cluster, tmp_path: Path) -> None:
    others = submit(devcluster, tmp_path / "fill", "sleep 300", "--exclusive", "--nodes=4")
    try:
        wait_state(devcluster, others, "RUNNING")
        argv = ["cluster=dev", f"paths.output_base={tmp_path / 'runs'}", "--json"]
        status, found, _ = result(command(*argv, "--wait", "1", env=environment_of(devcluster)))
        job = found["compute nodes: job"]
        assert status == 0 and job.level == "unknown" and "cancelled" in job.seen
        assert found["settings: JobRequeue"].level == "ok" and jobs_of(devcluster) == []
        # somebody loses patience
        process = command(*argv, env=environment_of(devcluster), process_group=0)
        wait_for("its job", lambda: jobs_of(devcluster))
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err
        assert jobs_of(devcluster) == []
        assert not (tmp_path / "runs" / ".doctor").exists()
    finally:
        devcluster.run("scancel", others)


@pytest.mark.slurm
def test_a_python_that_nodes_do_not_have(devcluster: dc.Cluster, tmp_path: Path) -> None:
    argv = ["cluster=dev", f"paths.output_base={tmp_path}", "cluster.python=/no/such/python", "--json"]
    status, found, _ = result(command(*argv, env=environment_of(devcluster)))
    assert status == 1 and found["compute nodes: Python"].level == "problem"
    assert "/no/such/python does not start" in found["compute nodes: Python"].seen


def test_a_cluster_that_was_never_started(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["cluster=dev", f"cluster.slurm_conf={tmp_path / 'none'}", f"paths.output_base={tmp_path}", "--json"]
    assert doctor.main(argv) == 1
    found = {f["name"]: f for f in json.loads(capsys.readouterr().out)["findings"]}
    assert "there is no" in found["controller"]["seen"] and found["controller"]["fix"].endswith("devcluster up")


@pytest.mark.slurm
def test_slurm_is_down(devcluster: dc.Cluster, tmp_path: Path) -> None:
    conf = tmp_path / "slurm.conf"
    conf.write_text(re.sub(r"SlurmctldPort=\d+", "SlurmctldPort=1", (devcluster.dir / "slurm.conf").read_text()))
    (tmp_path / "runs" / ".sites").mkdir(parents=True)
    site.write(tmp_path / "runs", "dev", Site(asked=1.0, slurm_cluster="as it was"))
    argv = ["cluster=dev", f"cluster.slurm_conf={conf}", f"paths.output_base={tmp_path / 'runs'}", "--json"]
    status, found, _ = result(command(*argv, env=environment_of(devcluster)))
    assert status == 1 and found["SLURM: controller"].level == "problem"
    assert "is DOWN" in found["SLURM: controller"].seen
    assert found["settings: scontrol show config"].level == found["compute nodes: job"].level == "unknown"
    assert not [f for f in found.values() if f.level == "ok" and f.topic in ("settings", "partition", "limits")]
    assert found["paths.output_base: atomic rename"].level == "ok"
    assert site.load(site.place(tmp_path / "runs", "dev")).slurm_cluster == "as it was"
