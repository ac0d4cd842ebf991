// A Kubernetes API server for custom resources alone: storage, validation, defaults, CEL, watches and status as any
// cluster has them, without pods, namespaces or permissions. Whoever has the token may do everything.
package main

import (
	"flag"
	"log"
	"net"
	"os"

	apiextensions "k8s.io/apiextensions-apiserver/pkg/apiserver"
	"k8s.io/apiextensions-apiserver/pkg/cmd/server/options"
	generated "k8s.io/apiextensions-apiserver/pkg/generated/openapi"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/authentication/request/bearertoken"
	"k8s.io/apiserver/pkg/authentication/token/tokenfile"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizerfactory"
	names "k8s.io/apiserver/pkg/endpoints/openapi"
	"k8s.io/apiserver/pkg/server"
	"k8s.io/apiserver/pkg/util/openapi"
	"k8s.io/client-go/kubernetes/scheme"
)

func main() {
	etcd := flag.String("etcd", "http://127.0.0.1:2379", "address of etcd")
	port := flag.Int("port", 6443, "port on 127.0.0.1")
	certificates := flag.String("certificates", "", "folder for the server's own certificate")
	token := flag.String("token", "", "the one token that the server takes")
	flag.Parse()
	if *token == "" || *certificates == "" {
		log.Fatal("-token and -certificates are needed")
	}
	if err := run(*etcd, *port, *certificates, *token); err != nil {
		log.Fatal(err)
	}
}

func run(etcd string, port int, certificates, token string) error {
	all := options.NewCustomResourceDefinitionsServerOptions(os.Stdout, os.Stderr)
	if err := all.Complete(); err != nil {
		return err
	}
	recommended := all.RecommendedOptions
	recommended.Etcd.StorageConfig.Transport.ServerList = []string{etcd}
	// Without it an old version is gone when etcd has compacted it, and not when a cache is full.
	recommended.Etcd.EnableWatchCache = false
	serving := recommended.SecureServing
	serving.BindAddress, serving.BindPort = net.ParseIP("127.0.0.1"), port
	serving.ServerCert.CertDirectory = certificates
	if err := serving.MaybeDefaultWithSelfSignedCerts("localhost", nil, []net.IP{serving.BindAddress}); err != nil {
		return err
	}

	config := server.NewRecommendedConfig(apiextensions.Codecs)
	if err := all.ServerRunOptions.ApplyTo(&config.Config); err != nil {
		return err
	}
	if err := recommended.Etcd.ApplyTo(&config.Config); err != nil {
		return err
	}
	if err := serving.ApplyToConfig(&config.Config); err != nil {
		return err
	}
	resources := apiextensions.DefaultAPIResourceConfigSource()
	if err := all.APIEnablement.ApplyTo(&config.Config, resources, apiextensions.Scheme); err != nil {
		return err
	}
	users := map[string]*user.DefaultInfo{token: {Name: "test"}}
	config.Authentication.Authenticator = bearertoken.New(tokenfile.New(users))
	config.Authorization.Authorizer = authorizerfactory.NewAlwaysAllowAuthorizer()
	// Strict validation and server-side apply take the fields' types from these.
	definitions := openapi.GetOpenAPIDefinitionsWithoutDisabledFeatures(generated.GetOpenAPIDefinitions)
	namer := names.NewDefinitionNamer(apiextensions.Scheme, scheme.Scheme)
	config.OpenAPIV3Config = server.DefaultOpenAPIV3Config(definitions, namer)
	config.AdmissionControl = admission.NewChainHandler()

	getter := options.NewCRDRESTOptionsGetter(
		*recommended.Etcd, config.ResourceTransformers, config.StorageObjectCountTracker)
	full := &apiextensions.Config{
		GenericConfig: config,
		ExtraConfig:   apiextensions.ExtraConfig{CRDRESTOptionsGetter: getter, MasterCount: 1},
	}
	built, err := full.Complete().New(server.NewEmptyDelegate())
	if err != nil {
		return err
	}
	return built.GenericAPIServer.PrepareRun().RunWithContext(server.SetupSignalContext())
}
