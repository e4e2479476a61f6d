"""What talks to the Kubernetes API, from a pod of the chart or a laptop: preflight, gate, cleanup, runner, recovery.

``api`` is the only module that knows the Kubernetes client; the others decide, and can be read without a cluster.

Exit statuses, the same for every command:

    0    done
    2    the user must change something
    1    gate, runner: a stage failed, after its own retries; cleanup: something still runs at the deadline
    3    the command itself could not do its work (no API server, a defect): worth another try
    143  asked to stop (SIGTERM); a later one goes on

So a Job's podFailurePolicy fails at once on 1 and 2.

What each command asks of the API, for the chart's RBAC, all in the release's namespace unless said otherwise.
Discovery (GET /apis/...) is open to every service account. tests/generator/cluster holds the code to this table.

    command    resource                           verbs
    preflight  persistentvolumeclaims             get
    preflight  persistentvolumeclaims             list       # optional: names the claims there are when one is missing
    preflight  secrets                            get        # resourceNames: the token's; no rule when there is none
    preflight  namespaces                         get        # resourceNames: its own; only with storage.prepare
    preflight  events                             list
    preflight  resourcequotas                     list
    preflight  pytorchjobs.kubeflow.org           create get delete   # a suspended probe; without them: "not checked"
    preflight  localqueues.kueue.x-k8s.io         get        # only with kueue.queueName
    preflight  nodes                              list       # cluster-wide, only with clusterScopedReads
    preflight  storageclasses.storage.k8s.io      get        # cluster-wide, only with clusterScopedReads
    gate       pytorchjobs.kubeflow.org           get list patch delete
    gate       pods                               list watch
    gate       pods/log                           get
    gate       events                             list
    cleanup    jobs.batch                         list patch delete
    cleanup    pods                               list delete
    cleanup    pytorchjobs.kubeflow.org           list delete
    runner     secrets                            list update
    runner     jobs.batch                         list patch
    runner     pods                               list

``genvalues install``, on top of what its Helm asks, with the rights of whoever calls it; only the first is always used:

    install    secrets                            list update
    install    jobs.batch                         list patch

What Helm asks on top, in detached mode: for the runner's ``helm upgrade --install RELEASE-run`` (Helm 4 applies on the
server's side and watches every hook), and for cleanup's ``helm uninstall RELEASE-run --no-hooks``. The runner's is
measured: tests/cluster/test_detached.py holds its Role to what the API server is asked for. To list PyTorchJobs, and
then to watch them, is what Helm does where the API server, before 1.34, does not do both at once.

    command    resource                           verbs
    upgrade    secrets                            get list create update delete
    upgrade    configmaps                         get create patch
    upgrade    jobs.batch                         list watch create patch delete
    upgrade    pytorchjobs.kubeflow.org           list watch create patch
    upgrade    pods                               list
    upgrade    pods/log                           get
    uninstall  secrets                            get list update delete
    uninstall  configmaps                         get delete
"""
