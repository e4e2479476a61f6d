"""Commands that talk to the Kubernetes API from a pod of the chart: preflight, gate, runner and cleanup.

``api`` is the only module that imports the Kubernetes client. The modules that decide (decision, guards, objects) take
and return plain objects, so they can be tested without a cluster.

Exit statuses, the same for every command:

    0    done
    2    the user must change something
    1    gate, runner: a stage failed after its own retries; cleanup: something still runs at the deadline
    3    the command itself failed (API server unavailable, internal error): retry
    143  stopped by SIGTERM; the next pod resumes

The podFailurePolicy of a Job fails the Job at once on 1 and 2, and retries anything else.

API requests of each command, for the chart's RBAC; in the release's namespace unless noted. Discovery (GET /apis/...)
is allowed to every service account. Events are for people only: a refused ``create`` of one is ignored.
tests/generator/cluster checks the code against this table.

    command    resource                           verbs
    preflight  persistentvolumeclaims             get
    preflight  persistentvolumeclaims             list       # optional: lists the existing claims when one is missing
    preflight  secrets                            get        # resourceNames: those of the values; no rule without one
    preflight  namespaces                         get        # resourceNames: its own; only with storage.prepare
    preflight  events                             list create
    preflight  resourcequotas                     list
    preflight  pytorchjobs.kubeflow.org           create get delete   # a suspended probe; without it: "not checked"
    preflight  localqueues.kueue.x-k8s.io         get        # only with kueue.queueName
    preflight  workloads.kueue.x-k8s.io           list       # only with kueue.queueName
    preflight  nodes                              list       # cluster-wide, only with clusterScopedReads
    preflight  storageclasses.storage.k8s.io      get        # cluster-wide, only with clusterScopedReads
    preflight  clusterqueues.kueue.x-k8s.io       get        # cluster-wide, only with both
    preflight  workloadpriorityclasses.kueue.x-k8s.io  get   # cluster-wide, only with both
    gate       pytorchjobs.kubeflow.org           get list patch delete
    gate       jobs.batch                         get        # its own
    gate       workloads.kueue.x-k8s.io           list       # only with kueue.queueName
    gate       pods                               list watch
    gate       pods/log                           get
    gate       events                             list create
    cleanup    jobs.batch                         list patch delete
    cleanup    pods                               list delete
    cleanup    pytorchjobs.kubeflow.org           list delete
    runner     configmaps                         list create update
    runner     secrets                            get delete    # resourceNames: Helm's records of before ConfigMaps
    runner     jobs.batch                         list patch
    runner     pods                               list
    runner     events                             create

With workload trainjob, these in place of those for PyTorchJobs (``upgrade``: see below):

    preflight-trainjob  trainjobs.trainer.kubeflow.org         create get delete
    preflight-trainjob  trainingruntimes.trainer.kubeflow.org  create delete
    gate-trainjob       trainjobs.trainer.kubeflow.org         get list patch delete
    gate-trainjob       trainingruntimes.trainer.kubeflow.org  delete
    cleanup-trainjob    trainjobs.trainer.kubeflow.org         list patch delete
    cleanup-trainjob    trainingruntimes.trainer.kubeflow.org  list delete
    upgrade-trainjob    trainjobs.trainer.kubeflow.org         list watch create patch
    upgrade-trainjob    trainingruntimes.trainer.kubeflow.org  list watch create patch

Where the cluster serves the API of the other workload too, an earlier revision may have left its jobs: gate may list
them, and cleanup may delete them as well. Both commands work without these rights.

Requests of ``genvalues install`` in addition to those of Helm, with the caller's permissions. Only the first is always
sent:

    install    secrets                            list update
    install    jobs.batch                         list patch

Requests of Helm in detached mode: the runner's ``helm upgrade --install RELEASE-run`` (Helm 4 uses server-side apply
and watches every hook) and cleanup's ``helm uninstall RELEASE-run --no-hooks``. The first is measured:
tests/cluster/test_detached.py compares the runner's Role with the requests that the API server receives. Helm lists
PyTorchJobs before it watches them when the API server is older than 1.34.

    command    resource                           verbs
    upgrade    configmaps                         get list create update patch delete
    upgrade    jobs.batch                         list watch create patch delete
    upgrade    pytorchjobs.kubeflow.org           list watch create patch
    upgrade    pods                               list
    upgrade    pods/log                           get
    uninstall  configmaps                         get list update delete
    uninstall  secrets                            delete        # resourceNames: Helm's records of before ConfigMaps
"""
