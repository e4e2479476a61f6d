"""A release from install to uninstall: started, followed, its logs, taken down, and packed for a bug report.

``stages`` decides, from objects alone, what each stage does; ``status`` fetches the objects; ``follow`` tells what
changes. What each command asks of the API, with the rights of whoever calls it, all in the release's namespace:

    command    resource                           verbs
    (all)      secrets                            list       # Helm's records of the release, by Helm
    status     jobs.batch                         list
    status     pytorchjobs.kubeflow.org           list
    status     pods                               list       # optional: nodes, why a pod does not start
    status     pods/log                           get        # optional: reasons, the log's tail, what was skipped
    status     events                             list       # optional: why there are no pods
    logs       as status, pods and pods/log needed
    uninstall  as status; persistentvolumeclaims  get        # optional: what stays
    uninstall  persistentvolumes                  get        # optional, cluster-wide: whether it outlives its claim
    bundle     as status; configmaps, persistentvolumeclaims list; nodes list (cluster-wide); all optional

``bundle`` and ``uninstall`` first get /version, which everybody may. Helm 4's ``helm status`` also gets each ordinary
object of the release. What is optional and refused is said in the answer ("not read"), never fatal. Exit statuses, of
every command:

    0    shown, or done; ``install`` and ``status --watch``: the pipeline is done
    1    may be tried again: no API server; a stage failed; Helm failed; stopped
    2    the user must change something: no such release, a missing right, a stage that ended with status 2
    130  Ctrl-C (143 SIGTERM, 129 hang-up)
"""
