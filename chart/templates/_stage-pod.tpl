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
{{- $settings := include "stage.settings" . | fromYaml -}}
metadata:
  labels:
    {{- $labels := include "stage.labels" . | fromYaml }}
    {{- include "stage.override" (dict "base" $settings.podLabels "over" $labels) | nindent 4 }}
  {{- $annotations := ternary (dict "karpenter.sh/do-not-disrupt" "true") dict (default false .trains) }}
  {{- with include "stage.override" (dict "base" $annotations "over" $settings.podAnnotations) | fromYaml }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ .account }}
  automountServiceAccountToken: {{ default false .callsApi }}
  enableServiceLinks: false
  {{- if .trains }}
  terminationGracePeriodSeconds: 120      # to save a checkpoint
  {{- else }}
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
    seccompProfile:
      type: RuntimeDefault
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
        {{- $environment := dict "HOME" "/tmp" "HF_HOME" "/tmp/huggingface" "PYTHONUNBUFFERED" "1" }}
        {{- $environment = merge $environment (include "stage.neuronEnvironment" . | fromYaml) }}
        {{- range $name, $value := include "stage.override" (dict "base" $environment "over" $settings.extraEnv) | fromYaml }}
        - name: {{ $name | quote }}
          value: {{ kindIs "string" $value | ternary $value (toJson $value) | quote }}
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
        {{- range $name := include "stage.monitoringVariables" . | fromJsonArray }}
        - name: {{ $name }}
          valueFrom:
            secretKeyRef:
              name: {{ $values.monitoring.secretName | quote }}
              key: {{ $name }}
              optional: true
        {{- end }}
      resources:
        {{- include "stage.resources" . | nindent 8 }}
      securityContext:
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities:
          drop: [ALL]
          {{- if .runAsRoot }}
          add: [CHOWN]
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

{{- /* stageDefaults, overridden key by key by the stage's settings. Lists and scalars are replaced. (mergeOverwrite would
       ignore a stage's 0, "" and false.) */}}
{{- define "stage.settings" -}}
{{- include "stage.override" (dict "base" .root.Values.stageDefaults "over" (get .root.Values.stages .settings)) }}
{{- end }}

{{- define "stage.override" -}}
{{- $result := deepCopy .base }}
{{- range $key, $value := .over }}
{{- if and (kindIs "map" $value) (kindIs "map" (get $result $key)) }}
{{- $value = include "stage.override" (dict "base" (get $result $key) "over" $value) | fromYaml }}
{{- end }}
{{- $_ := set $result $key $value }}
{{- end }}
{{- toYaml $result }}
{{- end }}

{{- /* Only stages that train request devices. */}}
{{- define "stage.resources" -}}
{{- $resources := (include "stage.settings" . | fromYaml).resources }}
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
{{- if ne .root.Values.instance "cpu" }}
{{- $_ := set $selector "node.kubernetes.io/instance-type" .root.Values.instance }}
{{- end }}
{{- if .root.Values.hyperpod.autoResume }}
{{- $_ := set $selector "sagemaker.amazonaws.com/node-health-status" "Schedulable" }}
{{- end }}
{{- end }}
{{- include "stage.override" (dict "base" $selector "over" (include "stage.settings" . | fromYaml).nodeSelector) }}
{{- end }}

{{- /* Nodes with devices are often tainted with the device's name. */}}
{{- define "stage.tolerations" -}}
{{- $tolerations := (include "stage.settings" . | fromYaml).tolerations }}
{{- if .trains }}
{{- range $device, $count := .root.Values.devices }}
{{- $tolerations = append $tolerations (dict "key" $device "operator" "Exists" "effect" "NoSchedule") }}
{{- end }}
{{- end }}
{{- toYaml $tolerations }}
{{- end }}
