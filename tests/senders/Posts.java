import java.io.BufferedReader;
import java.io.ByteArrayInputStream;
import java.io.IOException;
import java.io.InputStream;
import java.io.InputStreamReader;
import java.io.OutputStream;
import java.io.UncheckedIOException;
import java.net.HttpURLConnection;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.KeyStore;
import java.security.cert.Certificate;
import java.security.cert.CertificateFactory;
import javax.net.ssl.HttpsURLConnection;
import javax.net.ssl.SSLContext;
import javax.net.ssl.TrustManagerFactory;

/**
 * Posts with the two HTTP clients that every JDK since 11 has. Reads lines of client, framing, body
 * (a file, or a number of zeros), Content-Type and URL, with a tab between, and writes for each the
 * status and the body of the answer, or why there was none. Its argument, if any, is the certificate
 * of an authority.
 */
public class Posts {

    public static void main(String[] arguments) throws Exception {
        SSLContext tls = arguments.length > 0 ? trusting(Path.of(arguments[0])) : SSLContext.getDefault();
        HttpsURLConnection.setDefaultSSLSocketFactory(tls.getSocketFactory());
        HttpClient client = HttpClient.newBuilder().sslContext(tls).build();
        BufferedReader lines = new BufferedReader(new InputStreamReader(System.in));
        for (String line = lines.readLine(); line != null; line = lines.readLine()) {
            String[] post = line.split("\t");
            Body body = new Body(post[2]);
            String told;
            try {
                told = post[0].equals("HttpURLConnection")
                    ? byConnection(post[1], body, post[3], URI.create(post[4]))
                    : byClient(client, post[1], body, post[3], URI.create(post[4]));
            } catch (IOException error) {
                told = "no answer: " + error;
            }
            System.out.println(told.replaceAll("\\s", " "));
        }
    }

    private static String byConnection(String framing, Body body, String type, URI url)
            throws IOException {
        HttpURLConnection post = (HttpURLConnection) url.toURL().openConnection();
        post.setRequestMethod("POST");
        post.setDoOutput(true);
        post.setRequestProperty("Content-Type", type);
        if (framing.equals("length")) {
            post.setFixedLengthStreamingMode(body.size);
        } else if (framing.equals("chunks")) {
            post.setChunkedStreamingMode(1 << 16);
        }  // else it collects the body first
        try (InputStream from = body.open(); OutputStream to = post.getOutputStream()) {
            from.transferTo(to);
        }
        int status = post.getResponseCode();
        InputStream said = status < 400 ? post.getInputStream() : post.getErrorStream();
        return status + " " + (said == null ? "" : new String(said.readAllBytes()));
    }

    private static String byClient(HttpClient client, String framing, Body body, String type, URI url)
            throws IOException, InterruptedException {
        HttpRequest.BodyPublisher publisher = HttpRequest.BodyPublishers.ofInputStream(body::open);
        if (framing.equals("length")) {
            publisher = HttpRequest.BodyPublishers.fromPublisher(publisher, body.size);
        }
        HttpRequest post = HttpRequest.newBuilder(url).header("Content-Type", type).POST(publisher).build();
        HttpResponse<String> answer = client.send(post, HttpResponse.BodyHandlers.ofString());
        return answer.statusCode() + " " + answer.body();
    }

    private static SSLContext trusting(Path authority) throws Exception {
        Certificate certificate = CertificateFactory.getInstance("X.509")
            .generateCertificate(new ByteArrayInputStream(Files.readAllBytes(authority)));
        KeyStore trusted = KeyStore.getInstance(KeyStore.getDefaultType());
        trusted.load(null, null);
        trusted.setCertificateEntry("authority", certificate);
        TrustManagerFactory trust = TrustManagerFactory.getInstance(TrustManagerFactory.getDefaultAlgorithm());
        trust.init(trusted);
        SSLContext tls = SSLContext.getInstance("TLS");
        tls.init(null, trust.getTrustManagers(), null);
        return tls;
    }

    private static class Body {
        final long size;
        private final Path file;

        Body(String given) throws IOException {
            file = given.matches("[0-9]+") ? null : Path.of(given);
            size = file == null ? Long.parseLong(given) : Files.size(file);
        }

        InputStream open() {
            try {
                return file == null ? new Zeros(size) : Files.newInputStream(file);
            } catch (IOException error) {
                throw new UncheckedIOException(error);
            }
        }
    }

    private static class Zeros extends InputStream {
        private long left;

        Zeros(long size) {
            left = size;
        }

        @Override
        public int read() {
            return left-- > 0 ? 0 : -1;
        }

        @Override
        public int read(byte[] into, int offset, int length) {
            int count = (int) Math.min(length, left);
            left -= count;
            return count > 0 ? count : -1;
        }
    }
}
