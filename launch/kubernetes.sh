#!/usr/bin/env bash
# Runs sgpo_jax on Kubernetes as a JobSet: on a TPU slice of GKE, or on nodes with GPUs.
#
#   launch/kubernetes.sh image   --image IMAGE --extra tpu|gpu
#   launch/kubernetes.sh volume  --claim CLAIM --share SERVER:/SHARE
#   launch/kubernetes.sh put     --claim CLAIM --from LOCAL_PATH --to PATH
#   launch/kubernetes.sh run     --name NAME --image IMAGE [--claim CLAIM] --config configs/FILE.py --workdir DIR
#                                (--tpu GENERATION:TOPOLOGY | --nodes N --gpus N [--gpu-type TYPE])
#                                [--account NAME] [--spot] [--grace SECONDS] [--retries N] [-- --config.field=value ...]
#   launch/kubernetes.sh follow  --name NAME
#   launch/kubernetes.sh collect [--claim CLAIM] --workdir DIR --to LOCAL_DIR
#   launch/kubernetes.sh delete  --name NAME
#
# Every subcommand also takes --context CONTEXT and --namespace NAMESPACE (default: kubectl's own settings), and --dry-run,
# which prints the commands with their input, and runs none of them.
#
#   image    builds an image of the committed tree with its `tpu` or `gpu` extra, and pushes it.
#   volume   makes the claim CLAIM for an NFS share that all pods mount. Any other claim that many nodes can write to works
#            too.
#   put      copies a local file or folder to the volume.
#   run      submits the run. DIR is in a bucket, gs://BUCKET/PATH, or with --claim on the volume, such as /shared/NAME.
#            The volume is mounted at /shared, and data/ of the config is /shared/data. --account is the service account
#            of the pods in Kubernetes, which may use the bucket. --tpu is a slice of one node pool, such as v5e:4x4, v6e:8x8, v5p:2x2x4 or v4:2x2x4.
#            --gpus is the number of GPUs of each node, and TYPE their name in GKE, such as nvidia-h100-80gb. --spot uses
#            nodes that can be preempted. The JobSet restarts after every preemption, and at most N times (10) after other
#            failures. A pod has SECONDS (30) to save before it is stopped.
#   follow   prints the output of the first process, and follows it.
#   collect  copies the results in DIR, without the checkpoints, to LOCAL_DIR.
#   delete   stops the run, which saves, and removes it. The volume stays.
#
# kubectl must be set up for the cluster, which needs JobSet 0.6 or newer. For `image`, docker must be logged in to the
# registry. This script reads and stores no secrets.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

known="image, volume, put, run, follow, collect or delete"
(($# > 0)) || fail "the subcommand is missing: $known"
subcommand=$1
shift
values="context namespace" flags=""
case $subcommand in
--help | -h)
    usage
    exit
    ;;
image) values+=" image extra" ;;
volume) values+=" claim share" ;;
put) values+=" claim from to" ;;
run)
    values+=" name image claim config workdir account tpu nodes gpus gpu-type grace retries"
    flags="spot"
    ;;
follow | delete) values+=" name" ;;
collect) values+=" claim workdir to" ;;
*) fail "unknown subcommand '$subcommand': it must be $known" ;;
esac

context="" namespace="" name="" image="" extra="" claim="" share="" from="" to="" config="" workdir=""
account="" tpu="" nodes="" gpus="" gpu_type="" grace=30 retries=10 spot=no
parse "$subcommand" "$values" "$flags" "$@"
[[ $subcommand == run ]] || no_overrides "$subcommand"

kubectl=(kubectl)
if [[ -n $context ]]; then
    check context "$context" '[A-Za-z0-9_.:/@-]+' "a context of kubectl"
    kubectl+=(--context "$context")
fi
label='[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?'
what_label="lower-case letters, digits and hyphens, at most 40"
if [[ -n $namespace ]]; then
    check namespace "$namespace" "$label" "$what_label"
    kubectl+=(--namespace "$namespace")
fi

check_path() {
    if in_bucket "$2"; then
        check_bucket "$1" "$2"
        return
    fi
    [[ -n $claim ]] || fail "--claim is missing; without one, --$1 must be in a bucket, such as gs://my-bucket/qwen7b"
    check "$1" "$2" '/shared(/[A-Za-z0-9_.-]+)*' "a plain path in /shared"
}

check_image() {
    check image "$image" '[a-z0-9][A-Za-z0-9_./:@-]*' "an image such as REGION-docker.pkg.dev/PROJECT/REPOSITORY/sgpo_jax:1"
}

# Prints a YAML string in which Kubernetes expands no $(VARIABLE).
word() {
    json_string "${1//\$/\$\$}"
}

# Sets `nodes`, `resource`, `limit`, `selector`, and `processes`: the arguments by which the processes find each other.
accelerator() {
    local a b c chips
    if [[ -n $tpu ]]; then
        [[ -z $nodes$gpus$gpu_type ]] || fail "--tpu stands for --nodes, --gpus and --gpu-type; give it without them"
        check tpu "$tpu" '(v5e|v6e):(1x1|2x2|2x4|4x4|4x8|8x8|8x16|16x16)|(v4|v5p):[0-9]{1,2}x[0-9]{1,2}x[0-9]{1,2}' \
            "a slice such as v5e:16x16, v6e:8x8, v5p:2x2x4 or v4:2x2x4"
        IFS=x read -r a b c <<<"${tpu#*:}"
        chips=$((10#$a * 10#$b * 10#${c:-1}))
        # A slice of up to 8 chips in two dimensions is one machine. Other slices have machines of 4 chips.
        limit=4
        if [[ -z $c ]] && ((chips <= 8)); then
            limit=$chips
        fi
        ((chips > 0 && chips % limit == 0)) || fail "--tpu must have a multiple of 4 chips, not '$tpu'"
        nodes=$((chips / limit))
        resource=google.com/tpu
        case $tpu in
        v5e:*) selector="cloud.google.com/gke-tpu-accelerator: tpu-v5-lite-podslice" ;;
        v6e:*) selector="cloud.google.com/gke-tpu-accelerator: tpu-v6e-slice" ;;
        v5p:*) selector="cloud.google.com/gke-tpu-accelerator: tpu-v5p-slice" ;;
        v4:*) selector="cloud.google.com/gke-tpu-accelerator: tpu-v4-podslice" ;;
        esac
        selector+=$'\n'"              cloud.google.com/gke-tpu-topology: $(json_string "${tpu#*:}")"
        processes=", \"--distributed\""
    else
        [[ -n $nodes$gpus ]] || fail "--tpu is missing, or --nodes and --gpus"
        check nodes "$nodes" '[1-9][0-9]{0,3}' "a whole number from 1 on"
        check gpus "$gpus" '[1-9][0-9]?' "the number of GPUs of a node"
        resource=nvidia.com/gpu limit=$gpus selector=""
        if [[ -n $gpu_type ]]; then
            check gpu-type "$gpu_type" '[a-z0-9-]+' "a name such as nvidia-h100-80gb"
            selector="cloud.google.com/gke-accelerator: $(json_string "$gpu_type")"
        fi
        # A JobSet gives every pod the host name JOBSET-JOB-REPLICA-INDEX.JOBSET.
        processes=", \"--coordinator=$name-worker-0-0.$name:8476\", \"--processes=$nodes\", \"--process=\$(PROCESS)\""
    fi
    if [[ $spot == yes ]]; then
        selector+="${selector:+$'\n'              }cloud.google.com/gke-spot: \"true\""
    fi
}

jobset() {
    local command argument
    command="\"launch/preemptible.sh\", \"python\", \"-m\", \"sgpo_jax.main\"$processes"
    for argument in "--workdir=$workdir" "--config=$config" "--config.grace=$grace" ${overrides[@]+"${overrides[@]}"}; do
        command+=", $(word "$argument")"
    done
    cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $(json_string "$name")
$([[ -z $tpu ]] || echo "  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool")
spec:
  failurePolicy:
    maxRestarts: $retries
    rules:
    - action: RestartJobSetAndIgnoreMaxRestarts
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: worker
    replicas: 1
    template:
      spec:
        parallelism: $nodes
        completions: $nodes
        completionMode: Indexed
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes: {containerName: sgpo, operator: In, values: [75]}
          - action: FailJob
            onPodConditions: [{type: DisruptionTarget, status: "True"}]
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: $((grace + 30))
$([[ -z $account ]] || echo "            serviceAccountName: $(json_string "$account")")
$([[ -z $selector ]] || echo "            nodeSelector:
              $selector")
$([[ $spot == no ]] || echo "            tolerations:
            - {key: cloud.google.com/gke-spot, operator: Equal, value: \"true\", effect: NoSchedule}")
            containers:
            - name: sgpo
              image: $(json_string "$image")
              command: [$command]
              env:
$([[ -z $claim ]] || echo "              - {name: HF_HOME, value: /shared/huggingface}")
              - name: PROCESS
                valueFrom: {fieldRef: {fieldPath: "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
              resources:
                limits: {$resource: $limit}
              volumeMounts:
$([[ -z $claim ]] || echo "              - {name: shared, mountPath: /shared}")
              - {name: memory, mountPath: /dev/shm}
            volumes:
$([[ -z $claim ]] || echo "            - {name: shared, persistentVolumeClaim: {claimName: $(json_string "$claim")}}")
            - {name: memory, emptyDir: {medium: Memory}}
YAML
}

# Prints the pod through which files are copied to and from the volume.
files_pod() {
    cat <<YAML
apiVersion: v1
kind: Pod
metadata:
  name: $(json_string "$claim-files")
spec:
  restartPolicy: Never
  containers:
  - name: files
    image: debian:stable-slim
    command: [sleep, "86400"]
    volumeMounts:
    - {name: shared, mountPath: /shared}
  volumes:
  - {name: shared, persistentVolumeClaim: {claimName: $(json_string "$claim")}}
YAML
}

# Prints the volume and its claim. A worker must see at once what another one writes, so names and attributes are not cached.
volume() {
    cat <<YAML
apiVersion: v1
kind: PersistentVolume
metadata:
  name: $(json_string "${namespace:+$namespace-}$claim")
spec:
  capacity: {storage: 1Ti}
  accessModes: [ReadWriteMany]
  persistentVolumeReclaimPolicy: Retain
  storageClassName: ""
  mountOptions: [hard, nfsvers=3, actimeo=0]
  nfs: {server: "${share%%:*}", path: "${share#*:}"}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  name: $(json_string "$claim")
spec:
  accessModes: [ReadWriteMany]
  storageClassName: ""
  volumeName: $(json_string "${namespace:+$namespace-}$claim")
  resources: {requests: {storage: 1Ti}}
YAML
}

with_files() {
    execute_with "$(files_pod)" "${kubectl[@]}" create --filename -
    trap 'execute "${kubectl[@]}" delete pod "$claim-files" --wait=false' EXIT
    execute "${kubectl[@]}" wait --for=condition=Ready "pod/$claim-files" --timeout=600s
}

case $subcommand in
image)
    check_image
    check extra "$extra" 'tpu|gpu' "tpu or gpu"
    need docker git
    check_committed ""
    archive_tree
    build=(docker build --file launch/Dockerfile --build-arg "EXTRA=$extra" --tag "$image" -)
    if [[ $dry_run == yes ]]; then
        echo "$(quoted "${build[@]}") <$(quoted "$archive")"
    else
        "${build[@]}" <"$archive"
    fi
    execute docker push "$image"
    ;;
volume)
    check claim "$claim" "$label" "$what_label"
    [[ -n $share ]] || fail "--share is missing"
    check_share "$share"
    need kubectl
    execute_with "$(volume)" "${kubectl[@]}" create --filename -
    ;;
put)
    check claim "$claim" "$label" "$what_label"
    [[ -n $from ]] || fail "--from is missing"
    check_path to "$to"
    need kubectl
    with_files
    execute "${kubectl[@]}" cp "$from" "$claim-files:$to"
    ;;
run)
    check name "$name" "[a-z]([a-z0-9-]{0,38}[a-z0-9])?" "$what_label, the first a letter"
    check_image
    [[ -z $claim ]] || check claim "$claim" "$label" "$what_label"
    [[ -z $account ]] || check account "$account" "$label" "$what_label"
    check_config "$config"
    check_path workdir "$workdir"
    check_seconds grace "$grace"
    ((10#$grace > 0)) || fail "--grace must be at least 1"
    check retries "$retries" '[0-9]{1,3}' "a whole number"
    check_overrides
    accelerator
    manifest=$(jobset)
    need kubectl
    execute_with "$(grep -v '^$' <<<"$manifest")" "${kubectl[@]}" create --filename -
    ;;
follow)
    check name "$name" "$label" "$what_label"
    need kubectl
    execute "${kubectl[@]}" logs --follow --selector \
        "jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0" --tail 100
    ;;
collect)
    [[ -z $claim ]] || check claim "$claim" "$label" "$what_label"
    check_path workdir "$workdir"
    [[ -n $to ]] || fail "--to is missing"
    if in_bucket "$workdir"; then
        need gcloud
        collect_bucket "$workdir" "$to"
        exit
    fi
    need kubectl tar
    with_files
    execute "${kubectl[@]}" exec "$claim-files" -- sh -c \
        "tar -czf /tmp/results.tar.gz --exclude=checkpoints -C $workdir . || [ \$? -eq 1 ]" # 1: a file changed while tar read it
    execute mkdir -p "$to"
    execute "${kubectl[@]}" cp "$claim-files:/tmp/results.tar.gz" "$to/results.tar.gz"
    execute tar -xzf "$to/results.tar.gz" -C "$to"
    execute rm "$to/results.tar.gz"
    ;;
delete)
    check name "$name" "$label" "$what_label"
    need kubectl
    execute "${kubectl[@]}" delete jobset "$name"
    ;;
esac
