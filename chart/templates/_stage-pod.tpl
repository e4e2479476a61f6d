{{- /*
    The pod of a stage: everything under `template:`.

    root             the chart's context
    stage            the stage's name; also the component label
    settings         its key in values.stages
    container        the container's name
    command          list
    account          the service account's name
    callsApi         mounts the account's token
    config           mounts the run config
    workspace        mounts the volume
    readOnly         mounts the volume read-only
    token            sets HF_TOKEN from this Secret: {name, key}; none if the name is empty
    monitored        sets the credentials of monitoring.secretName: stages of the trainer
    trains           compile and train: requests devices and nodes that have them, shared memory, time to save
    compiles         compiles graphs for the accelerator on a CPU
    runAsRoot        only for storage-prepare
*/}}
{{- define "stage.pod" -}}
{{- $values := .root.Values }}
{{- $settings := include "stage.settings" . | fromJson -}}
metadata:
  labels:
    {{- $labels := include "stage.podLabels" . | fromYaml }}
    {{- include "stage.override" (dict "base" $settings.podLabels "over" $labels) | nindent 4 }}
  {{- $annotations := ternary (dict "karpenter.sh/do-not-disrupt" "true") dict (default false .trains) }}
  {{- with include "stage.merge" (dict "base" $annotations "over" $settings.podAnnotations) | fromJson }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ $settings.serviceAccountName | default .account }}
  automountServiceAccountToken: {{ default false .callsApi }}
  enableServiceLinks: false
  {{- with $settings.terminationGracePeriodSeconds }}
  terminationGracePeriodSeconds: {{ int64 . }}
  {{- end }}
  {{- if not .trains }}
  restartPolicy: Never      # required by podFailurePolicy; a PyTorchJob sets it on the replica
  {{- end }}
  {{- with $values.image.pullSecrets }}
  imagePullSecrets:
    {{- range $name, $use := . }}
    {{- if $use }}
    - name: {{ $name | quote }}
    {{- end }}
    {{- end }}
  {{- end }}
  {{- with $settings.schedulerName }}
  schedulerName: {{ . | quote }}
  {{- end }}
  {{- with $settings.priorityClassName }}
  priorityClassName: {{ . | quote }}
  {{- end }}
  {{- with include "stage.nodeSelector" . | fromYaml }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with include "stage.tolerations" . | fromYamlArray }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $settings.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $settings.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext:
    {{- if .runAsRoot }}
    runAsUser: 0
    runAsGroup: 0
    {{- else }}
    runAsNonRoot: true
    runAsUser: {{ int64 $values.securityContext.runAsUser }}
    runAsGroup: {{ int64 $values.securityContext.runAsGroup }}
    fsGroup: {{ int64 $values.securityContext.runAsGroup }}
    fsGroupChangePolicy: OnRootMismatch
    {{- end }}
    {{- with $settings.supplementalGroups }}
    supplementalGroups:
      {{- range . }}
      - {{ int64 . }}
      {{- end }}
    {{- end }}
    seccompProfile:
      {{- $settings.seccompProfile | default (dict "type" "RuntimeDefault") | toYaml | nindent 6 }}
  containers:
    - name: {{ .container }}
      image: {{ include "llama-lora.image" .root | quote }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      terminationMessagePolicy: FallbackToLogsOnError     # `kubectl describe pod` shows why a stage failed
      command: {{ toJson .command }}
      env:
        - name: LLAMA_LORA_WORKSPACE
          value: {{ $values.workspace.mountPath | quote }}
        - name: LLAMA_LORA_IMAGE      # for the report
          value: {{ include "llama-lora.image" .root | quote }}
        {{- if .trains }}
        - name: LLAMA_LORA_GRACE_SECONDS      # what the launcher may take to save
          value: {{ int $settings.terminationGracePeriodSeconds | quote }}
        {{- end }}
        {{- $environment := dict "HOME" "/tmp" "HF_HOME" "/tmp/huggingface" "PYTHONUNBUFFERED" "1" }}
        {{- $environment = merge $environment (include "stage.neuronEnvironment" . | fromYaml) }}
        {{- range $name, $value := include "stage.merge" (dict "base" $environment "over" $settings.extraEnv) | fromJson }}
        {{- if not (hasKey $settings.extraEnvSecrets $name) }}
        - name: {{ $name | quote }}
          value: {{ kindIs "string" $value | ternary $value (toJson $value) | quote }}
        {{- end }}
        {{- end }}
        {{- if .callsApi }}
        - name: LLAMA_LORA_JOB_UID      # of the Job, for events about it
          valueFrom:
            fieldRef:
              fieldPath: metadata.labels['controller-uid']
        {{- end }}
        {{- if and .token .token.name }}
        - name: HF_TOKEN
          valueFrom:
            secretKeyRef:
              name: {{ .token.name | quote }}
              key: {{ .token.key | quote }}
        {{- end }}
        {{- range $name, $from := $settings.extraEnvSecrets }}
        - name: {{ $name | quote }}
          valueFrom:
            secretKeyRef:
              {{- toYaml $from | nindent 14 }}
        {{- end }}
        {{- range $name := include "stage.monitoringVariables" . | fromJsonArray }}
        {{- if not (hasKey $settings.extraEnvSecrets $name) }}
        - name: {{ $name }}
          valueFrom:
            secretKeyRef:
              name: {{ $values.monitoring.secretName | quote }}
              key: {{ $name }}
              optional: true
        {{- end }}
        {{- end }}
      {{- with $settings.extraEnvFrom }}
      envFrom:      # a variable of env above takes precedence
        {{- range . }}
        - {{ toYaml . | nindent 10 | trim }}
        {{- end }}
      {{- end }}
      resources:
        {{- include "stage.resources" . | nindent 8 }}
      securityContext:
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities:
          drop: [ALL]
          {{- with include "stage.capabilities" . | fromJsonArray }}
          add: {{ toJson . }}
          {{- end }}
      volumeMounts:
        - name: tmp
          mountPath: /tmp
        {{- if .config }}
        - name: config
          mountPath: /etc/llama-lora
          readOnly: true
        {{- end }}
        {{- if .workspace }}
        - name: workspace
          mountPath: {{ $values.workspace.mountPath | quote }}
          {{- if .readOnly }}
          readOnly: true
          {{- end }}
        {{- end }}
        {{- if .trains }}
        - name: shm
          mountPath: /dev/shm
        {{- end }}
        {{- range $name, $mount := $settings.extraVolumeMounts }}
        - name: {{ $name | quote }}
          {{- toYaml $mount | nindent 10 }}
        {{- end }}
  volumes:
    - name: tmp
      emptyDir: {}
    {{- if .config }}
    - name: config
      configMap:
        name: {{ include "llama-lora.config.name" .root }}
    {{- end }}
    {{- if .workspace }}
    - name: workspace
      persistentVolumeClaim:
        claimName: {{ include "llama-lora.claim.name" .root | quote }}
    {{- end }}
    {{- if .trains }}
    - name: shm               # the container runtime's default has 64 MB
      emptyDir:
        medium: Memory
        sizeLimit: {{ $values.sharedMemory | quote }}     # a write beyond it fails; without a limit the pod is killed
    {{- end }}
    {{- range $name, $source := $settings.extraVolumes }}
    - name: {{ $name | quote }}
      {{- toYaml $source | nindent 6 }}
    {{- end }}
{{- end }}

{{- /* Variables that a stage takes from monitoring.secretName, by name: a Secret that may set any variable could run code in the
       pod (LD_PRELOAD). Only train logs to trackers. */}}
{{- define "stage.monitoringVariables" -}}
{{- $monitoring := .root.Values.monitoring }}
{{- $names := list }}
{{- if and .monitored $monitoring.secretName }}
{{- if $monitoring.pushgateway }}{{ $names = concat $names (list "PUSHGATEWAY_USERNAME" "PUSHGATEWAY_PASSWORD") }}{{ end }}
{{- if $monitoring.otlpEndpoint }}{{ $names = append $names "OTEL_EXPORTER_OTLP_HEADERS" }}{{ end }}
{{- if and $monitoring.wandb (eq .stage "train") }}{{ $names = append $names "WANDB_API_KEY" }}{{ end }}
{{- if and $monitoring.mlflow (eq .stage "train") }}
{{- $names = concat $names (list "MLFLOW_TRACKING_TOKEN" "MLFLOW_TRACKING_USERNAME" "MLFLOW_TRACKING_PASSWORD") }}
{{- end }}
{{- end }}
{{- $names | toJson }}
{{- end }}

{{- /* Mount paths of the chart's volumes in the pod above, without the workspace. */}}
{{- define "stage.mountPaths" -}}
{{ list "/tmp" "/etc/llama-lora" "/dev/shm" | toJson }}
{{- end }}

{{- /* Directories that the container needs, so that nothing may be mounted over them. */}}
{{- define "stage.systemPaths" -}}
{{ list "/" "/bin" "/dev" "/etc" "/lib" "/lib64" "/opt" "/proc" "/sbin" "/sys" "/usr" | toJson }}
{{- end }}

{{- /* stageDefaults, overridden key by key by the stage's settings. Lists and scalars are replaced. (mergeOverwrite would
       ignore a stage's 0, "" and false.) Arguments: root, settings. */}}
{{- define "stage.settings" -}}
{{- $common := omit .root.Values.stageDefaults }}
{{- if has .settings (list "gate" "runner") }}
{{- /* They end with what they follow. Before that they must not: the limits on cost and stalls, and the next stages, would end
       with them. */}}
{{- $common = omit $common "activeDeadlineSeconds" }}
{{- end }}
{{- if not (has .settings (include "stage.ofTrainer" . | fromJsonArray)) }}
{{- /* A variable may run code (LD_PRELOAD), and these stages have permissions in the cluster or run as root. */}}
{{- $_ := set $common "extraEnvSecrets" dict }}
{{- $_ := set $common "extraEnvFrom" dict }}
{{- end }}
{{- include "stage.merge" (dict "base" $common "over" (get .root.Values.stages .settings)) }}
{{- end }}

{{- /* The keys of the stages that run the trainer, without any permission in the cluster. */}}
{{- define "stage.ofTrainer" -}}
{{- list "tokenize" "rehearse" "compile" "neff" "train" "consolidate" "merge" "evaluate" "publish" | toJson }}
{{- end }}

{{- /* The capabilities that a container adds. */}}
{{- define "stage.capabilities" -}}
{{- $added := ternary (list "CHOWN") list (default false .runAsRoot) }}
{{- range $name, $add := (include "stage.settings" . | fromJson).capabilities }}
{{- if $add }}{{ $added = append $added $name }}{{ end }}
{{- end }}
{{- uniq $added | toJson }}
{{- end }}

{{- define "stage.override" -}}
{{- include "stage.merge" . | fromJson | toYaml }}
{{- end }}

{{- /* The same as JSON, which Helm reads and writes ten times as fast as YAML: half the time of a rendering. A null takes a key
       away; of a map or a list its content, so that templates need not ask whether there is one. */}}
{{- define "stage.merge" -}}
{{- $result := omit .base }}      {{- /* a copy whose maps are those of .base */}}
{{- range $key, $value := .over }}
{{- $under := get $result $key }}
{{- if kindIs "map" $value }}
{{- $value = include "stage.merge" (dict "base" (kindIs "map" $under | ternary $under dict) "over" $value) | fromJson }}
{{- else if and (kindIs "invalid" $value) (kindIs "map" $under) }}
{{- $value = dict }}
{{- else if and (kindIs "invalid" $value) (kindIs "slice" $under) }}
{{- $value = list }}
{{- end }}
{{- if kindIs "invalid" $value }}
{{- $_ := unset $result $key }}
{{- else }}
{{- $_ := set $result $key $value }}
{{- end }}
{{- end }}
{{- toJson $result }}
{{- end }}

{{- /* Only stages that train request devices. */}}
{{- define "stage.resources" -}}
{{- $resources := (include "stage.settings" . | fromJson).resources }}
{{- range $bound, $quantities := $resources }}
{{- range $resource, $quantity := $quantities }}
{{- $_ := set $quantities $resource (toString $quantity) }}     {{- /* a PyTorchJob accepts "1.5", but not 1.5 */}}
{{- end }}
{{- if $.trains }}
{{- range $device, $count := $.root.Values.devices }}
{{- $_ := set $quantities $device (int64 $count) }}
{{- end }}
{{- end }}
{{- end }}
{{- toYaml $resources }}
{{- end }}

{{- define "stage.nodeSelector" -}}
{{- $selector := dict }}
{{- if .trains }}
{{- $selector = include "stage.reservedNodes" .root | fromYaml }}
{{- if ne .root.Values.instance "cpu" }}
{{- $_ := set $selector "node.kubernetes.io/instance-type" .root.Values.instance }}
{{- end }}
{{- if .root.Values.hyperpod.autoResume }}
{{- $_ := set $selector "sagemaker.amazonaws.com/node-health-status" "Schedulable" }}
{{- end }}
{{- end }}
{{- include "stage.override" (dict "base" $selector "over" (include "stage.settings" . | fromJson).nodeSelector) }}
{{- end }}

{{- /* Labels of the nodes that were launched into capacityReservation. The labels of Karpenter and EKS Auto Mode:
       https://karpenter.sh/docs/tasks/odcrs, https://docs.aws.amazon.com/eks/latest/userguide/auto-odcr.html; of managed node
       groups: https://docs.aws.amazon.com/eks/latest/userguide/capacity-blocks-mng.html. */}}
{{- define "stage.reservedNodes" -}}
{{- $wanted := .Values.capacityReservation }}
{{- $labels := dict }}
{{- $prefix := get (dict "karpenter" "karpenter.k8s.aws" "auto-mode" "eks.amazonaws.com") $wanted.provisioner }}
{{- if $prefix }}
{{- $_ := set $labels "karpenter.sh/capacity-type" "reserved" }}
{{- with $wanted.type }}{{ $_ := set $labels (printf "%s/capacity-reservation-type" $prefix) . }}{{ end }}
{{- with $wanted.id }}{{ $_ := set $labels (printf "%s/capacity-reservation-id" $prefix) . }}{{ end }}
{{- else if eq $wanted.provisioner "node-group" }}
{{- if eq $wanted.type "capacity-block" }}{{ $_ := set $labels "eks.amazonaws.com/capacityType" "CAPACITY_BLOCK" }}{{ end }}
{{- with $wanted.group }}{{ $_ := set $labels "eks.amazonaws.com/nodegroup" . }}{{ end }}
{{- else if eq $wanted.provisioner "hyperpod" }}
{{- $_ := set $labels "sagemaker.amazonaws.com/instance-group-name" $wanted.group }}
{{- end }}
{{- toYaml $labels }}
{{- end }}

{{- /* Nodes with devices are often tainted with the device's name. */}}
{{- define "stage.tolerations" -}}
{{- $tolerations := (include "stage.settings" . | fromJson).tolerations }}
{{- if .trains }}
{{- range $device, $count := .root.Values.devices }}
{{- $tolerations = append $tolerations (dict "key" $device "operator" "Exists" "effect" "NoSchedule") }}
{{- end }}
{{- end }}
{{- toYaml $tolerations }}
{{- end }}
