"""Commands for an operator, outside the cluster: install a release, follow it, read its logs, uninstall it, report it.

``stages`` decides from objects alone what each stage does; ``status`` fetches the objects; ``status_text`` puts them
into words. API requests of each command, with the caller's rights, in the release's namespace unless said otherwise:

    command    resource                           verbs
    (all)      secrets                            list       # Helm's records of the release, by Helm
    (all)      configmaps                         list       # those of RELEASE-run, in mode detached
    status     jobs.batch                         list
    status     pytorchjobs.kubeflow.org           list       # or the next: the release's workload
    status     trainjobs.trainer.kubeflow.org     list
    status     pods                               list       # optional: nodes, why a pod does not start
    status     pods/log                           get        # optional: reasons, the log's tail, which stages skipped
    status     events                             list       # optional: why there are no pods
    logs       as status; pods and pods/log are required
    uninstall  as status; persistentvolumeclaims  get        # optional: what remains
    uninstall  persistentvolumes                  get        # optional, cluster-wide: whether it outlives its claim
    bundle     as status; configmaps, persistentvolumeclaims list; nodes list (cluster-wide); all optional

``bundle`` and ``uninstall`` first get /version, which every user may. Helm 4's ``helm status`` also gets each object
of the release that is not a hook. A refused optional request is reported ("not read") and is not an error. Exit
statuses:

    0    shown, or done; ``install`` and ``status --watch``: the pipeline is done
    1    a retry may help: no API server; a stage failed; Helm failed; stopped
    2    the user must change something: no such release, a missing right, a stage that ended with status 2
    130  Ctrl-C (143 SIGTERM, 129 hang-up)
"""
