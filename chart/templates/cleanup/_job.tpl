{{- /*
    Stops what still runs and waits until its pods are gone: hooks are not owned by the release. All it needs is in its
    arguments. Arguments: root, name, hooks, startSeconds.

    Its Job has startSeconds, for a pod that never starts. A pod that does start first gives its Job the time that the
    work may take on top of that (--own-job): a Job's deadline counts from its creation, the pulling of the image included.
*/}}
{{- define "llama-lora.cleanup.job" -}}
{{- $values := .root.Values }}
{{- if $values.cleanup.enabled }}
{{- $timeout := int $values.cleanup.timeoutSeconds }}
{{- include "stage.job" (dict
      "root" .root
      "name" .name
      "stage" "cleanup"
      "settings" "cleanup"
      "weight" -10
      "hooks" .hooks
      "deletePolicy" "before-hook-creation,hook-succeeded"
      "needsCluster" true
      "finalStatuses" (list 1 2)
      "activeDeadlineSeconds" .startSeconds
      "command" (list "genvalues" "cluster" "cleanup" "--release" .root.Release.Name "--namespace" .root.Release.Namespace
                      "--run" (include "llama-lora.run.label" .root)
                      "--timeout-seconds" (toString $timeout)
                      "--own-job" .name (toString (add .startSeconds $timeout 20)))
      "account" (include "llama-lora.cleanup.account" .root)
      "callsApi" true) }}
{{- end }}
{{- end }}
