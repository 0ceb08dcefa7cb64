package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"flag"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/structpb"
	security "istio.io/api/security/v1alpha1"
)

// csr makes a P-256 key, has istiod sign it, and writes key.pem and cert.pem.
func csr(args []string) error {
	set := flag.NewFlagSet("csr", flag.ExitOnError)
	var c connection
	c.flags(set)
	token := set.String("token", "", "file with the caller's service-account token (audience istio-ca)")
	san := set.String("san", "", "URI put into the request (istiod takes the identity from the credential instead)")
	impersonate := set.String("impersonate", "", "SPIFFE id asked for on behalf of another service account of this node")
	seconds := set.Int64("validity", 3600, "validity asked for, in seconds")
	out := set.String("out", ".", "folder for key.pem and cert.pem")
	set.Parse(args)

	key, request, err := signingRequest(*san)
	if err != nil {
		return err
	}
	conn, err := c.dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if ctx, err = c.withToken(ctx, *token); err != nil {
		return err
	}
	message := &security.IstioCertificateRequest{Csr: string(request), ValidityDuration: *seconds}
	if *impersonate != "" {
		message.Metadata = &structpb.Struct{Fields: map[string]*structpb.Value{
			"ImpersonatedIdentity": structpb.NewStringValue(*impersonate),
		}}
	}
	since := time.Now()
	answer, err := security.NewIstioCertificateServiceClient(conn).CreateCertificate(ctx, message)
	if err != nil {
		return err
	}
	fmt.Printf("%d certificates after %d ms\n", len(answer.CertChain), time.Since(since).Milliseconds())
	for _, text := range answer.CertChain {
		describe(text)
	}
	if err := os.MkdirAll(*out, 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(*out, "key.pem"), key, 0o600); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(*out, "cert.pem"), []byte(strings.Join(answer.CertChain, "")), 0o600)
}

func signingRequest(san string) (key, request []byte, err error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	template := &x509.CertificateRequest{}
	if san != "" {
		uri, err := url.Parse(san)
		if err != nil {
			return nil, nil, err
		}
		template.URIs = []*url.URL{uri}
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, private)
	if err != nil {
		return nil, nil, err
	}
	plain, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return nil, nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: plain}),
		pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), nil
}

func describe(text string) {
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		fmt.Println("  not PEM")
		return
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		fmt.Println("  not a certificate:", err)
		return
	}
	fmt.Printf("  subject=%q issuer=%q ca=%v uris=%v dns=%v valid=%s key=%s usage=%v\n", cert.Subject, cert.Issuer, cert.IsCA,
		cert.URIs, cert.DNSNames, cert.NotAfter.Sub(cert.NotBefore), cert.PublicKeyAlgorithm, cert.ExtKeyUsage)
}
